// Pointwise functions with their first two derivatives; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void act_forward(Activation kind, T alpha, T beta, Index count, const T* x, T* y, Share share);
template <typename T>
void act_backward(Activation kind, T alpha, T beta, Index count, const T* x, const T* gy, T* gx,
                  bool accumulate, Share share);
template <typename T>
void act_tangent(Activation kind, T alpha, T beta, Index count, const T* x, const T* dx, T* dy,
                 Share share);
template <typename T>
void act_backward_tangent(Activation kind, T alpha, T beta, Index count, const T* x, const T* dx,
                          const T* gy, const T* dgy, T* dgx, bool accumulate, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
