// Pixels to the values that a network sees; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void scale_bytes(Index count, const std::uint8_t* x, T factor, T shift, T* out);
template <typename T>
void scale(Index count, const T* x, T factor, T shift, T* out);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
