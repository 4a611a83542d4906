// Fused multiply-adds that never leave the registers.
#include "peak.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
double fma_rounds(Index rounds) {
  constexpr int kChains = kManyRegisters ? 24 : 12;  // to hide the latency of all units
  Vec<T> chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = broadcast(static_cast<T>(i));
  const Vec<T> shrink = broadcast(static_cast<T>(0.5)), add = broadcast(static_cast<T>(1));
  for (Index round = 0; round < rounds; ++round) {
    for (int i = 0; i < kChains; ++i) chains[i] = fma(chains[i], shrink, add);
  }
  // The sum is stored so that the work cannot be left out.
  volatile T total = 0;
  for (int i = 0; i < kChains; ++i) total = total + chains[i][0];
  return 2.0 * kChains * kLanes<T> * static_cast<double>(rounds);
}

template double fma_rounds<float>(Index);
template double fma_rounds<double>(Index);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
