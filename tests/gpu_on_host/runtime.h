// What the pretended CUDA runtime tells those who run kernels on it.
#pragma once

#include <cuda_runtime_api.h>

#include <functional>

namespace gpu_on_host {

bool is_capturing(cudaStream_t stream);

// Runs `work` now, or notes it where the stream is being captured: replays run it.
void enqueue(cudaStream_t stream, std::function<void()> work);

// What a graph cannot hold was asked of a stream that is being captured.
void break_off_capture(cudaStream_t stream);

bool is_device_memory(const void* pointer);

}  // namespace gpu_on_host
