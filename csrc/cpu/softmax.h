// Softmax of each row, or its logarithm; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void softmax_forward(bool log, bool safe, Index rows, Index columns, const T* x, T* y, Share share);
template <typename T>
void softmax_backward(bool log, Index rows, Index columns, const T* y, const T* gy, T* gx,
                      bool accumulate, Share share);
template <typename T>
void softmax_tangent(bool log, Index rows, Index columns, const T* y, const T* dx, T* dy,
                     Share share);
template <typename T>
void softmax_backward_tangent(bool log, Index rows, Index columns, const T* y, const T* dy,
                              const T* gy, const T* dgy, T* dgx, bool accumulate, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
