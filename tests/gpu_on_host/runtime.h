// The CUDA runtime, as far as PyTorch calls it, for two devices that are the host.
//
// Loaded before everything else, under the driver's name, so that all calls come here. What is not
// here is answered by the real runtime, which finds no driver and says so.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>
#include <mutex>

namespace gpu_on_host {

// --- for those who run kernels

bool is_capturing(cudaStream_t stream);

// Runs `work` once somebody waits for it; where the stream is being captured, when it is replayed.
void enqueue(cudaStream_t stream, std::function<void()> work);

// What a graph cannot hold was asked of a stream that is being captured.
void break_off_capture(cudaStream_t stream);

bool is_device_memory(const void* pointer);

// --- for the other parts of the runtime

using Lock = std::lock_guard<std::recursive_mutex>;

constexpr int kDevices = 2;
extern std::recursive_mutex mutex;  // of all that the runtime keeps
extern thread_local int current_device;

// Returns `error`, and keeps it for cudaGetLastError.
cudaError_t answer(cudaError_t error);

// Whether a call that might disturb a capture is let through; see
// cudaThreadExchangeStreamCaptureMode.
cudaError_t disturbing();

// Runs what is queued on all streams, or on those of a device.
cudaError_t finish_all(int device = -1);

}  // namespace gpu_on_host
