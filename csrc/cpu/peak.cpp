// Fused multiply-adds that never leave the registers.
#include "peak.h"

#include <utility>

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// Chains are named one by one: of an array that a loop runs over compilers keep 24 in memory.
template <typename T, std::size_t... I>
T fma_chains(Index rounds, std::index_sequence<I...>) {
  Vec<T> chains[] = {broadcast(static_cast<T>(I))...};
  const Vec<T> shrink = broadcast(static_cast<T>(0.5)), add = broadcast(static_cast<T>(1));
  for (Index round = 0; round < rounds; ++round) {
    ((chains[I] = fma(chains[I], shrink, add)), ...);
  }
  return (chains[I][0] + ...);
}

}  // namespace

template <typename T>
double fma_rounds(Index rounds) {
  constexpr int kChains = kManyRegisters ? 24 : 12;  // to hide the latency of all units
  // The sum is stored so that the work cannot be left out.
  [[maybe_unused]] volatile T total = fma_chains<T>(rounds, std::make_index_sequence<kChains>());
  return 2.0 * kChains * kLanes<T> * static_cast<double>(rounds);
}

template double fma_rounds<float>(Index);
template double fma_rounds<double>(Index);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
