// Random numbers of a GPU: the host's, by the seed and the offset of the GPU's own generator.
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include <cstdint>
#include <mutex>
#include <tuple>

namespace gpu_on_host {

// For one call, for which the generator of `device`, or the one that is `given`, moves on.
inline at::Generator generator_of_call(at::Device device, const c10::IValue& given) {
  at::Generator own =
      given.isGenerator() ? given.toGenerator() : at::globalContext().defaultGenerator(device);
  const std::lock_guard<std::mutex> lock(own.mutex());
  const std::uint64_t offset = own.get_offset();
  own.set_offset(offset + 4);  // which counts in fours
  return at::detail::createCPUGenerator(own.current_seed() ^ (offset * 0x9e3779b97f4a7c15u));
}

// Whose kernel on the host would take numbers from the host's generator. As on a GPU, other ones
// where x has gaps.
inline std::tuple<at::Tensor, at::Tensor> dropout(const at::Tensor& x, double p,
                                                  std::optional<bool> train) {
  if (!train.value_or(true)) return {x.clone(), at::ones_like(x, x.options().dtype(at::kBool))};
  at::Tensor kept = at::empty_like(x, x.options().dtype(at::kBool)).bernoulli_(1 - p);
  if (!x.is_non_overlapping_and_dense()) kept = kept.flip(0);
  return {x * kept * (p < 1 ? 1 / (1 - p) : 0.0), kept};
}

}  // namespace gpu_on_host
