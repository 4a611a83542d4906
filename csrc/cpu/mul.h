// Products of arrays, element by element; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void multiply(Index count, const T* a, const T* b, const T* c, const T* d, T* out, bool accumulate,
              Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
