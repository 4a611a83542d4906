#include "masked_fill.h"

#include "vector_math.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void masked_fill(Index count, const T* mask, const T* x, T value, T* out, bool accumulate,
                 Share share) {
  const Range mine = split_elements<T>(count, share);
  const Vec<T> half = broadcast(T(0.5)), filling = broadcast(value);
  for (Index i = mine.begin; i < mine.end; i += kLanes<T>) {
    const Index left = mine.end - i;
    const Vec<T> kept = x ? load_up_to(x + i, left) : Vec<T>{};
    Vec<T> filled = select<T>(load_up_to(mask + i, left) > half, filling, kept);
    if (accumulate) filled += load_up_to(out + i, left);
    store_up_to(out + i, filled, left);
  }
}

#define FASTMAML_INSTANTIATE(T) \
  template void masked_fill<T>(Index, const T*, const T*, T, T*, bool, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
