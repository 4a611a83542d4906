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
  int emulated_threads = 1;            // of a team on the host
  Index* emulated_launches = nullptr;  // counted here, if anywhere
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

// An inner learning rate: rate, or rate * rates[0], or rate * rates[i] for parameter i.
struct RateTerm {
  double rate = 1;
  const void* rates = nullptr;
  bool per_parameter = false;
};

// moved = theta - rate * gradient, [tasks, size] each.
struct UpdateStep {
  DType dtype = DType::kFloat32;
  const void* theta = nullptr;
  Index theta_stride = 0;  // elements from one task to the next (0: all tasks share theta)
  const void* gradient = nullptr;
  RateTerm rate;
  void* moved = nullptr;
  Index tasks = 0, size = 0;
};

// Of a cotangent on `moved`: the cotangents on gradient, and on rates, one for each parameter,
// summed over tasks. (That on theta is the cotangent itself.) Outputs may be null.
struct UpdateAdjoint {
  DType dtype = DType::kFloat32;
  const void* cotangent = nullptr;  // [tasks, size]
  const void* gradient = nullptr;
  RateTerm rate;
  void* dgradient = nullptr;  // [tasks, size]
  void* drates = nullptr;     // [size]
  Index tasks = 0, size = 0;
};

// y = f(W x + b); `weight` [out, in] and `bias` are places in theta.
struct MlpLayer {
  Index in = 0, out = 0;
  Index weight = 0, bias = -1;  // no bias: -1
  int activation = -1;          // an Activation of cpu/kernels.h; none: -1
  double alpha = 0, beta = 0;
};

// MetaStepArgs for a chain of layers whose parameters are all adapted and fill theta.
struct MlpMetaStep {
  DType dtype = DType::kFloat32;
  const MlpLayer* layers = nullptr;  // on the host, read during the call
  Index depth = 0;
  const void* theta = nullptr;  // [theta_size], where every task starts
  Index theta_size = 0;
  const void* support_x = nullptr;  // [support_batches, tasks, support_examples, in]
  const void* support_y = nullptr;
  Index support_examples = 0, support_batches = 1;
  const void* query_x = nullptr;  // null: adaptation only; query_y null: predictions only
  const void* query_y = nullptr;
  Index query_examples = 0;
  Index tasks = 0, steps = 1;
  TaskLoss loss = TaskLoss::kMeanSquaredError;
  bool first_order = false;
  double rate = 0;
  const void* rates = nullptr;  // [rate_steps, theta_size]; null: ones
  Index rate_steps = 1;
  bool gradient = false;        // gtheta is wanted
  bool rates_gradient = false;  // grates is wanted, too
  void* losses = nullptr;       // [tasks]
  void* mean_loss = nullptr;    // [1], of losses
  void* gtheta = nullptr;       // [theta_size], mean over tasks
  void* grates = nullptr;       // [rate_steps, theta_size], mean over tasks
  void* adapted = nullptr;      // [tasks, theta_size]
  void* predictions = nullptr;  // [tasks, query_examples, out]
  void* scratch = nullptr;      // mlp_scratch_bytes of this very call
  // [1], zero before the call and after it; for gtheta and mean_loss. Calls that may run at the
  // same time have each their own.
  std::uint64_t* arrived = nullptr;
};

struct DeviceKernels {
  void (*require_usable)(int device);        // raises where no kernel of these can be loaded
  Index (*shared_memory_limit)(int device);  // bytes that a block may have

  void (*draw_episodes)(const EpisodeBatch& batch, const Stream& stream);
  void (*update)(const UpdateStep& step, const Stream& stream);
  void (*update_adjoint)(const UpdateAdjoint& adjoint, const Stream& stream);

  // What a call needs of a block's shared memory, and as scratch; data pointers do not matter.
  Index (*mlp_shared_bytes)(const MlpMetaStep& step);
  Index (*mlp_scratch_bytes)(const MlpMetaStep& step);
  void (*mlp_meta_step)(const MlpMetaStep& step, const Stream& stream);
};

const DeviceKernels* cuda_kernels();  // null where the library was built without CUDA
const DeviceKernels* emulated_kernels();

}  // namespace fastmaml
