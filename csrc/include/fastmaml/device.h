// The public face of the kernels in csrc/cuda: one table of functions for the GPU, and one of the
// same sources compiled for the host. Pointers are the device's. A call queues work on its stream;
// it waits for nothing and allocates nothing, so it may be captured in a CUDA graph. Errors are
// std::invalid_argument (a wrong argument) or std::runtime_error (with CUDA's own text).
#pragma once

#include <cstdint>

#include "fastmaml/core.h"

namespace fastmaml {

struct Stream {
  std::uintptr_t handle = 0;  // a cudaStream_t
  int device = 0;
  int emulated_threads = 1;  // of a team on the host
};

// One batch of episodes, bit for bit that of EpisodeDrawer::draw. See core.h for the images' values
// and episode.h for who is drawn.
struct EpisodeBatch {
  const void* images = nullptr;  // [count, channels, plane]
  Pixel pixel = Pixel::kByte;
  Index channels = 1;
  Index plane = 0;
  const void* factors = nullptr;  // [channels] of the batch's type, and so for shifts
  const void* shifts = nullptr;
  const Index* members = nullptr;
  const Index* starts = nullptr;  // [classes] into members
  const Index* counts = nullptr;  // [classes]
  Index classes = 0;
  Index ways = 0, shots = 0, queries = 0, tasks = 0;
  Rotations rotations = Rotations::kNone;
  Index first_task = 0;
  void* support_x = nullptr;
  void* query_x = nullptr;
  std::uint64_t seed = 0, batch = 0;
  // [3] on the device: seed, batch, 0. Taken instead of the two above, and moved on by one batch
  // when this one is drawn: a graph that is replayed draws the next batch each time.
  std::uint64_t* place = nullptr;
};

struct DeviceKernels {
  Index (*shared_memory_limit)(int device);  // bytes that a block may have

  void (*draw_episodes)(const EpisodeBatch& batch, const Stream& stream);
};

const DeviceKernels* cuda_kernels();  // null where the library was built without CUDA
const DeviceKernels* emulated_kernels();

}  // namespace fastmaml
