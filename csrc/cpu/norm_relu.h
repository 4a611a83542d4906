// Batch norm, ReLU and max-pool in one; see kernels.h for what each function computes.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void norm_relu_forward(const NormReluShape& shape, const NormReluState<T>& state, T eps,
                       Share share);
template <typename T>
void norm_relu_backward(const NormReluShape& shape, const NormReluState<T>& state, const T* gy,
                        T* gx, bool accumulate, T* ggamma, T* gbeta, Share share);
template <typename T>
void norm_relu_tangent(const NormReluShape& shape, const NormReluState<T>& state,
                       const NormReluTangent<T>& tangent, const T* dbeta, T* dy, Share share);
template <typename T>
void norm_relu_backward_tangent(const NormReluShape& shape, const NormReluState<T>& state,
                                const NormReluTangent<T>& tangent, const T* gy, const T* dgy,
                                const T* ggamma, const T* gbeta, T* dgx, bool accumulate,
                                T* dggamma, T* dgbeta, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
