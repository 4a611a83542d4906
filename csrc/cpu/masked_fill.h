// A number in place of what a mask covers; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void masked_fill(Index count, const T* mask, const T* x, T value, T* out, bool accumulate,
                 Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
