// The CUDA runtime, as far as PyTorch calls it, for two devices that are the host: their memory is
// the host's, what is queued is run at once, and a graph is a list of what is to be run. What a
// capture forbids is refused as CUDA refuses it.
//
// Loaded before everything else, under the driver's name, so that all calls come here. What is not
// here is answered by the real runtime, which finds no driver and says so.
#include "runtime.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using Work = std::function<void()>;

constexpr int kDevices = 2;
constexpr std::size_t kMemory = std::size_t{8} << 30;
constexpr std::size_t kAlignment = 512;  // of PyTorch's blocks
constexpr int kNothing = 0xFF;           // floating-point numbers of such bytes are not numbers

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  CUstream_st* begun_on;
  std::thread::id thread = std::this_thread::get_id();
  bool broken_off = false;
  std::vector<Work> work = {};
};

std::recursive_mutex mutex;
std::set<std::shared_ptr<Capture>> captures;  // that have not ended
std::map<const char*, std::size_t> device_memory[kDevices], pinned_memory;
std::size_t allocated[kDevices] = {};
thread_local int current_device = 0;
unsigned long long last_capture = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;

}  // namespace

struct CUstream_st {
  std::shared_ptr<Capture> capture = nullptr;
  int priority = 0;
  int device = current_device;
};

struct CUevent_st {
  std::weak_ptr<Capture> capture = {};
  std::chrono::steady_clock::time_point when = {};
  int device = current_device;
};

struct CUgraph_st {
  std::vector<Work> work;
};

struct CUgraphExec_st {
  std::vector<Work> work;
};

namespace {

using Lock = std::lock_guard<std::recursive_mutex>;

CUstream_st* stream_of(cudaStream_t handle) {
  static CUstream_st default_streams[kDevices] = {{nullptr, 0, 0}, {nullptr, 0, 1}};
  const bool is_default = reinterpret_cast<std::uintptr_t>(handle) <= 2;
  return is_default ? &default_streams[current_device] : handle;
}

// The capture that `handle` is part of, which may have ended elsewhere.
std::shared_ptr<Capture>& capture_of(cudaStream_t handle) {
  std::shared_ptr<Capture>& capture = stream_of(handle)->capture;
  if (!captures.count(capture)) capture = nullptr;
  return capture;
}

cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t refuse(Capture& capture, cudaError_t error) {
  capture.broken_off = true;
  return answer(error);
}

// Whether a call that might disturb a capture is let through; see
// cudaThreadExchangeStreamCaptureMode.
cudaError_t disturbing() {
  const Lock lock(mutex);
  if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  for (const auto& capture : captures) {
    const bool own = capture->thread == std::this_thread::get_id() &&
                     capture->mode != cudaStreamCaptureModeRelaxed;
    const bool foreign =
        thread_mode == cudaStreamCaptureModeGlobal && capture->mode == cudaStreamCaptureModeGlobal;
    if (own || foreign) return refuse(*capture, cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

// The same of one that waits for a stream.
cudaError_t waiting(cudaStream_t stream) {
  const Lock lock(mutex);
  if (const auto& capture = capture_of(stream)) {
    return refuse(*capture, cudaErrorStreamCaptureUnsupported);
  }
  return disturbing();
}

cudaError_t waiting(cudaEvent_t event) {
  const Lock lock(mutex);
  const auto capture = event->capture.lock();
  if (captures.count(capture)) return refuse(*capture, cudaErrorCapturedEvent);
  return disturbing();
}

bool lies_in(const std::map<const char*, std::size_t>& memory, const void* pointer) {
  const char* place = static_cast<const char*>(pointer);
  const auto next = memory.upper_bound(place);
  if (next == memory.begin()) return false;
  const auto& [start, size] = *std::prev(next);
  return place < start + size;
}

cudaError_t make_stream(cudaStream_t* stream, int priority) {
  *stream = new CUstream_st{nullptr, priority, current_device};
  return cudaSuccess;
}

cudaError_t make_event(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}

}  // namespace

namespace gpu_on_host {

bool is_capturing(cudaStream_t stream) {
  const Lock lock(mutex);
  return capture_of(stream) != nullptr;
}

void enqueue(cudaStream_t stream, Work work) {
  {
    const Lock lock(mutex);
    if (stream_of(stream)->device != current_device) {
      throw std::invalid_argument("a kernel is launched on a stream of another device");
    }
    if (const auto& capture = capture_of(stream)) {
      capture->work.push_back(std::move(work));
      return;
    }
  }
  work();
}

void break_off_capture(cudaStream_t stream) {
  const Lock lock(mutex);
  if (const auto& capture = capture_of(stream)) capture->broken_off = true;
}

bool is_device_memory(const void* pointer) {
  const Lock lock(mutex);
  return lies_in(device_memory[current_device], pointer);
}

}  // namespace gpu_on_host

using gpu_on_host::enqueue;

extern "C" {

// --- the device ----------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return answer(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "the host as a GPU");
  properties->major = 9;
  properties->totalGlobalMem = kMemory;
  properties->multiProcessorCount = 132;
  properties->warpSize = 32;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->sharedMemPerBlock = 48 << 10;
  properties->sharedMemPerBlockOptin = 227 << 10;
  properties->regsPerMultiprocessor = 1 << 16;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize() {
  const Lock lock(mutex);
  cudaError_t error = cudaSuccess;
  for (const auto& capture : captures) {
    if (capture->begun_on->device != current_device) continue;
    error = refuse(*capture, cudaErrorStreamCaptureUnsupported);
  }
  return error;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}

// --- memory --------------------------------------------------------------------------------------

cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  const Lock lock(mutex);
  *free = kMemory - allocated[current_device];
  *total = kMemory;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, std::size_t size) {
  if (const cudaError_t error = disturbing()) return error;
  const Lock lock(mutex);
  if (allocated[current_device] + size > kMemory || posix_memalign(pointer, kAlignment, size)) {
    return answer(cudaErrorMemoryAllocation);
  }
  std::memset(*pointer, kNothing, size);
  device_memory[current_device][static_cast<const char*>(*pointer)] = size;
  allocated[current_device] += size;
  return cudaSuccess;
}

cudaError_t cudaFree(void* pointer) {
  if (pointer == nullptr) return cudaSuccess;
  if (const cudaError_t error = disturbing()) return error;
  const Lock lock(mutex);
  for (int device = 0; device < kDevices; ++device) {
    const auto found = device_memory[device].find(static_cast<const char*>(pointer));
    if (found == device_memory[device].end()) continue;
    allocated[device] -= found->second;
    device_memory[device].erase(found);
    std::free(pointer);
    return cudaSuccess;
  }
  return answer(cudaErrorInvalidValue);
}

cudaError_t cudaHostAlloc(void** pointer, std::size_t size, unsigned) {
  const Lock lock(mutex);
  if (posix_memalign(pointer, kAlignment, size)) return answer(cudaErrorMemoryAllocation);
  pinned_memory[static_cast<const char*>(*pointer)] = size;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* pointer) {
  const Lock lock(mutex);
  pinned_memory.erase(static_cast<const char*>(pointer));
  std::free(pointer);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const Lock lock(mutex);
  *attributes = {};
  const bool pinned = lies_in(pinned_memory, pointer);
  attributes->type = pinned ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  for (int device = 0; device < kDevices; ++device) {
    if (!lies_in(device_memory[device], pointer)) continue;
    attributes->type = cudaMemoryTypeDevice;
    attributes->device = device;
  }
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t size, cudaMemcpyKind,
                            cudaStream_t stream) {
  enqueue(stream, [=] { std::memmove(to, from, size); });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, std::size_t size, cudaStream_t stream) {
  enqueue(stream, [=] { std::memset(to, value, size); });
  return cudaSuccess;
}

// --- streams and events --------------------------------------------------------------------------

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  return make_stream(stream, 0);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  return make_stream(stream, priority);
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  *priority = stream_of(stream)->priority;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return waiting(stream); }

cudaError_t cudaStreamQuery(cudaStream_t stream) { return waiting(stream); }

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  const Lock lock(mutex);
  std::shared_ptr<Capture>& own = capture_of(handle);
  const auto noted = event->capture.lock();
  const auto capture = captures.count(noted) ? noted : nullptr;
  if (capture == own) return cudaSuccess;
  if (own) return refuse(*own, cudaErrorStreamCaptureIsolation);
  own = capture;
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return make_event(event); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make_event(event); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  const Lock lock(mutex);
  if (event->device != stream_of(stream)->device) return answer(cudaErrorInvalidResourceHandle);
  event->capture = capture_of(stream);
  event->when = std::chrono::steady_clock::now();
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return waiting(event); }

cudaError_t cudaEventSynchronize(cudaEvent_t event) { return waiting(event); }

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t start, cudaEvent_t end) {
  *ms = std::chrono::duration<float, std::milli>(end->when - start->when).count();
  return cudaSuccess;
}

// --- graphs --------------------------------------------------------------------------------------

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  const Lock lock(mutex);
  CUstream_st* stream = stream_of(handle);
  if (stream != handle) return answer(cudaErrorStreamCaptureUnsupported);
  if (capture_of(stream)) return answer(cudaErrorIllegalState);
  stream->capture = std::make_shared<Capture>(Capture{++last_capture, mode, stream});
  captures.insert(stream->capture);
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  const Lock lock(mutex);
  const auto capture = capture_of(stream);
  *graph = nullptr;
  if (!capture) return answer(cudaErrorIllegalState);
  if (capture->begun_on != stream) return refuse(*capture, cudaErrorStreamCaptureUnmatched);
  const bool other_thread = capture->thread != std::this_thread::get_id();
  if (other_thread && capture->mode != cudaStreamCaptureModeRelaxed) {
    return refuse(*capture, cudaErrorStreamCaptureWrongThread);
  }
  captures.erase(capture);
  if (capture->broken_off) return answer(cudaErrorStreamCaptureInvalidated);
  *graph = new CUgraph_st{std::move(capture->work)};
  return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  const Lock lock(mutex);
  const auto& capture = capture_of(stream);
  *status = !capture              ? cudaStreamCaptureStatusNone
            : capture->broken_off ? cudaStreamCaptureStatusInvalidated
                                  : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, std::size_t* count) {
  const Lock lock(mutex);
  if (graph != nullptr) *graph = nullptr;
  if (dependencies != nullptr) *dependencies = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  const auto& capture = capture_of(stream);
  if (capture && id != nullptr) *id = capture->id;
  return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* instance, cudaGraph_t graph,
                                          unsigned long long) {
  *instance = new CUgraphExec_st{graph->work};
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, std::size_t* count) {
  *count = graph->work.size();
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t instance, cudaStream_t stream) {
  for (const Work& work : instance->work) enqueue(stream, work);
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t instance) {
  if (const cudaError_t error = disturbing()) return error;
  delete instance;
  return cudaSuccess;
}

}  // extern "C"
