// Loops that the compiler turns into vectors.
#include "pixels.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void scale_bytes(Index count, const std::uint8_t* __restrict x, T factor, T shift,
                 T* __restrict out) {
  for (Index i = 0; i < count; ++i) out[i] = static_cast<T>(x[i]) * factor + shift;
}

template <typename T>
void scale(Index count, const T* __restrict x, T factor, T shift, T* __restrict out) {
  for (Index i = 0; i < count; ++i) out[i] = x[i] * factor + shift;
}

#define FASTMAML_INSTANTIATE(T)                                       \
  template void scale_bytes<T>(Index, const std::uint8_t*, T, T, T*); \
  template void scale<T>(Index, const T*, T, T, T*);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
