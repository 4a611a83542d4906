// The devices and their memory, which is the host's.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>

#include "runtime.h"

using namespace gpu_on_host;

namespace {

constexpr std::size_t kMemory = std::size_t{8} << 30;
constexpr std::size_t kAlignment = 512;  // of PyTorch's blocks
constexpr int kNothing = 0xFF;           // floating-point numbers of such bytes are not numbers

std::map<const char*, std::size_t> device_memory[kDevices], pinned_memory;
std::size_t allocated[kDevices] = {};

bool lies_in(const std::map<const char*, std::size_t>& memory, const void* pointer) {
  const char* place = static_cast<const char*>(pointer);
  const auto next = memory.upper_bound(place);
  if (next == memory.begin()) return false;
  const auto& [start, size] = *std::prev(next);
  return place < start + size;
}

}  // namespace

namespace gpu_on_host {

bool is_device_memory(const void* pointer) {
  const Lock lock(mutex);
  return lies_in(device_memory[current_device], pointer);
}

}  // namespace gpu_on_host

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
  if (const cudaError_t error = finish_all()) return error;
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
  if (const cudaError_t error = finish_all()) return error;
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

}  // extern "C"
