// Teams are thread blocks; see team.h.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "fastmaml/device.h"

#define FASTMAML_TEAM_NAMESPACE cuda
#define FASTMAML_TEAM __device__

namespace fastmaml {
namespace cuda {

class Team {
 public:
  FASTMAML_TEAM int rank() const { return static_cast<int>(threadIdx.x); }
  FASTMAML_TEAM int size() const { return static_cast<int>(blockDim.x); }
  FASTMAML_TEAM Index block() const { return blockIdx.x; }
  FASTMAML_TEAM Index blocks() const { return gridDim.x; }
  FASTMAML_TEAM void sync() const { __syncthreads(); }

  // For whole teams, once in a launch: whether all other blocks have been here. What they read and
  // wrote before is then done, and plain loads see it. `arrived` is 0 before and after a launch.
  FASTMAML_TEAM bool is_last_block(unsigned long long* arrived) const {
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
      __threadfence();  // also for what the barrier has shown this thread: the whole team's writes
      last = atomicAdd(arrived, 1ull) + 1 == gridDim.x;
      if (last) *arrived = 0;
      __threadfence();  // lines that the team's cache held before are not read again
    }
    return __syncthreads_or(last);
  }
};

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would be blamed for it
  throw std::runtime_error(what + ": CUDA error: " + cudaGetErrorString(error));
}

// Launches go to the stream's device, and the thread's current device stays what it was.
class OnDevice {
 public:
  OnDevice(int device, const std::string& what) : device_(device) {
    check(cudaGetDevice(&before_), what);
    if (before_ != device_) check(cudaSetDevice(device_), what + ": device");
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_, before_ = 0;
};

template <typename Body>
__global__ void __launch_bounds__(Body::kThreads) run(const __grid_constant__ Body body) {
  extern __shared__ __align__(16) unsigned char shared[];
  body(Team(), shared);
}

struct Nothing {
  static constexpr int kThreads = 32;
  FASTMAML_TEAM void operator()(const Team&, unsigned char*) const {}
};

// Loading one of them tells whether the driver takes what the kernels were compiled to.
inline void require_usable(int device) {
  const OnDevice guard(device, "require_usable");
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, run<Nothing>), "require_usable: a kernel");
}

// Shared memory that a block of `device` may have.
inline Index shared_memory_limit(int device) {
  int bytes = 0;
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "shared_memory_limit: device");
  return bytes;
}

// Queues `blocks` teams; `what` names the call in errors.
template <typename Body>
void launch(const std::string& what, const Body& body, Index blocks, std::size_t shared_bytes,
            const Stream& stream) {
  constexpr std::size_t kWithoutAsking = 48 << 10;
  const OnDevice guard(stream.device, what);
  if (shared_bytes > kWithoutAsking) {
    // all there is, so that no other thread's call lowers it before this launch
    check(cudaFuncSetAttribute(run<Body>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_memory_limit(stream.device))),
          what + ": " + std::to_string(shared_bytes) + " bytes of shared memory");
  }
  run<Body><<<static_cast<unsigned>(blocks), Body::kThreads, shared_bytes,
              reinterpret_cast<cudaStream_t>(stream.handle)>>>(body);
  check(cudaGetLastError(), what);
}

}  // namespace cuda
}  // namespace fastmaml
