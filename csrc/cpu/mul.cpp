#include "mul.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void multiply(Index count, const T* a, const T* b, const T* c, const T* d, T* out, bool accumulate,
              Share share) {
  const Range mine = split_elements<T>(count, share);
  for (Index i = mine.begin; i < mine.end; i += kLanes<T>) {
    const Index left = mine.end - i;
    Vec<T> value = load_up_to(a + i, left) * load_up_to(b + i, left);
    if (c) value = fma(load_up_to(c + i, left), load_up_to(d + i, left), value);
    if (accumulate) value += load_up_to(out + i, left);
    store_up_to(out + i, value, left);
  }
}

#define FASTMAML_INSTANTIATE(T) \
  template void multiply<T>(Index, const T*, const T*, const T*, const T*, T*, bool, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
