#include "cuda/mlp.h"
#include "cuda/sampler.h"
#include "cuda/update.h"

namespace fastmaml {

#ifdef __CUDACC__
const DeviceKernels* cuda_kernels() {
#else
const DeviceKernels* emulated_kernels() {
#endif
  namespace team = FASTMAML_TEAM_NAMESPACE;
  static const DeviceKernels kernels = {
      &team::require_usable,    &team::shared_memory_limit,
      &team::draw_episodes,     &team::update,
      &team::update_adjoint,    &team::mlp_shared_bytes,
      &team::mlp_scratch_bytes, &team::mlp_meta_step,
  };
  return &kernels;
}

}  // namespace fastmaml
