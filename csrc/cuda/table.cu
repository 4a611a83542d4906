#include "cuda/sampler.h"

namespace fastmaml {

#ifdef __CUDACC__
const DeviceKernels* cuda_kernels() {
#else
const DeviceKernels* emulated_kernels() {
#endif
  namespace team = FASTMAML_TEAM_NAMESPACE;
  static const DeviceKernels kernels = {
      &team::shared_memory_limit,
      &team::draw_episodes,
  };
  return &kernels;
}

}  // namespace fastmaml
