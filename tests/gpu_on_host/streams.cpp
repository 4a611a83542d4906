// Streams, events and graphs. A graph is a list of what is to be run. What is queued on a stream is
// run as late as CUDA allows, so that who does not wait for another stream finds nothing there;
// what a capture forbids is refused as CUDA refuses it.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "runtime.h"

using gpu_on_host::answer;
using gpu_on_host::current_device;
using gpu_on_host::disturbing;
using gpu_on_host::enqueue;
using gpu_on_host::kDevices;
using gpu_on_host::Lock;
using gpu_on_host::mutex;

namespace {

using Work = std::function<void()>;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  CUstream_st* begun_on;
  std::thread::id thread = std::this_thread::get_id();
  bool broken_off = false;
  std::vector<Work> work = {};
};

std::recursive_mutex running;                 // held while queued work runs, of whichever stream
std::set<std::shared_ptr<Capture>> captures;  // that have not ended
unsigned long long last_capture = 0;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local cudaError_t last_error = cudaSuccess;
std::vector<CUstream_st*> streams;  // that were made, which PyTorch keeps

}  // namespace

// Python's, in a process that is Python.
extern "C" {
__attribute__((weak)) int Py_IsInitialized();
__attribute__((weak)) int PyGILState_Check();
__attribute__((weak)) void* PyEval_SaveThread();
__attribute__((weak)) void PyEval_RestoreThread(void*);
}

struct CUstream_st {
  std::shared_ptr<Capture> capture = nullptr;
  int priority = 0;
  int device = current_device;
  std::deque<Work> queued = {};
  std::uint64_t queued_ever = 0, done = 0;
};

struct CUevent_st {
  std::weak_ptr<Capture> capture = {};
  CUstream_st* stream = nullptr;
  std::uint64_t place = 0;  // in the stream's queue
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

CUstream_st on_device(int device) {
  CUstream_st stream;
  stream.device = device;
  return stream;
}

CUstream_st* default_stream(int device) {
  static CUstream_st of_device[kDevices] = {on_device(0), on_device(1)};
  return &of_device[device];
}

CUstream_st* stream_of(cudaStream_t handle) {
  const bool is_default = reinterpret_cast<std::uintptr_t>(handle) <= 2;
  return is_default ? default_stream(current_device) : handle;
}

// The capture that `handle` is part of, which may have ended elsewhere.
std::shared_ptr<Capture>& capture_of(cudaStream_t handle) {
  std::shared_ptr<Capture>& capture = stream_of(handle)->capture;
  if (!captures.count(capture)) capture = nullptr;
  return capture;
}

cudaError_t refuse(Capture& capture, cudaError_t error) {
  capture.broken_off = true;
  return answer(error);
}

// Work may be Python's, which another thread may hold up.
class PythonUnlocked {
 public:
  PythonUnlocked() {
    const bool locked = PyGILState_Check && Py_IsInitialized() && PyGILState_Check();
    if (locked) state_ = PyEval_SaveThread();
  }
  ~PythonUnlocked() {
    if (state_ != nullptr) PyEval_RestoreThread(state_);
  }

 private:
  void* state_ = nullptr;
};

// Runs what is queued before `place`.
cudaError_t finish(CUstream_st* stream, std::uint64_t place) {
  const PythonUnlocked unlocked;
  const std::lock_guard<std::recursive_mutex> alone(running);
  while (true) {
    Work work;
    {
      const Lock lock(mutex);
      if (stream->done >= place) return cudaSuccess;
      work = std::move(stream->queued.front());
      stream->queued.pop_front();
    }
    cudaError_t error = cudaSuccess;
    try {
      work();
    } catch (const std::exception& failure) {
      std::fprintf(stderr, "a kernel failed: %s\n", failure.what());
      error = answer(cudaErrorLaunchFailure);
    }
    const Lock lock(mutex);
    ++stream->done;
    if (error != cudaSuccess) return error;
  }
}

cudaError_t finish(CUstream_st* stream) {
  std::unique_lock<std::recursive_mutex> lock(mutex);
  const std::uint64_t all = stream->queued_ever;
  lock.unlock();
  return finish(stream, all);
}

// Whether a call that waits for a stream is let through.
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

cudaError_t make_stream(cudaStream_t* stream, int priority) {
  *stream = new CUstream_st;
  (*stream)->priority = priority;
  const Lock lock(mutex);
  streams.push_back(*stream);
  return cudaSuccess;
}

cudaError_t make_event(cudaEvent_t* event) {
  *event = new CUevent_st;
  return cudaSuccess;
}

}  // namespace

namespace gpu_on_host {

std::recursive_mutex mutex;
thread_local int current_device = 0;

cudaError_t answer(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

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

cudaError_t finish_all(int device) {
  std::vector<CUstream_st*> all;
  {
    const Lock lock(mutex);
    all = streams;
    for (int i = 0; i < kDevices; ++i) all.push_back(default_stream(i));
  }
  for (CUstream_st* stream : all) {
    if (device >= 0 && stream->device != device) continue;
    if (const cudaError_t error = finish(stream)) return error;
  }
  return cudaSuccess;
}

bool is_capturing(cudaStream_t stream) {
  const Lock lock(mutex);
  return capture_of(stream) != nullptr;
}

void enqueue(cudaStream_t handle, Work work) {
  const Lock lock(mutex);
  CUstream_st* stream = stream_of(handle);
  if (stream->device != current_device) {
    throw std::invalid_argument("a kernel is launched on a stream of another device");
  }
  if (const auto& capture = capture_of(stream)) {
    capture->work.push_back(std::move(work));
  } else {
    stream->queued.push_back(std::move(work));
    ++stream->queued_ever;
  }
}

void break_off_capture(cudaStream_t stream) {
  const Lock lock(mutex);
  if (const auto& capture = capture_of(stream)) capture->broken_off = true;
}

}  // namespace gpu_on_host

extern "C" {

cudaError_t cudaDeviceSynchronize() {
  {
    const Lock lock(mutex);
    cudaError_t error = cudaSuccess;
    for (const auto& capture : captures) {
      if (capture->begun_on->device != current_device) continue;
      error = refuse(*capture, cudaErrorStreamCaptureUnsupported);
    }
    if (error != cudaSuccess) return error;
  }
  return gpu_on_host::finish_all(current_device);
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }

cudaError_t cudaPeekAtLastError() { return last_error; }

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
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

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const cudaError_t error = waiting(stream)) return error;
  return finish(stream_of(stream));
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  if (const cudaError_t error = waiting(handle)) return error;
  const Lock lock(mutex);
  return stream_of(handle)->queued.empty() ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  const Lock lock(mutex);
  std::shared_ptr<Capture>& own = capture_of(handle);
  const auto noted = event->capture.lock();
  const auto capture = captures.count(noted) ? noted : nullptr;
  if (capture == nullptr && own == nullptr) {
    enqueue(handle, [stream = event->stream, place = event->place] {
      if (stream != nullptr) finish(stream, place);
    });
    return cudaSuccess;
  }
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
  event->stream = stream_of(stream);
  event->place = event->stream->queued_ever;
  event->when = std::chrono::steady_clock::now();
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (const cudaError_t error = waiting(event)) return error;
  const Lock lock(mutex);
  const bool passed = event->stream == nullptr || event->stream->done >= event->place;
  return passed ? cudaSuccess : cudaErrorNotReady;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (const cudaError_t error = waiting(event)) return error;
  return event->stream == nullptr ? cudaSuccess : finish(event->stream, event->place);
}

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
