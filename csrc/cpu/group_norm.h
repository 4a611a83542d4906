// Normalisation of each example by itself; see kernels.h for what each function computes.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void group_norm_forward(const GroupNormShape& shape, const T* x, const T* gamma, const T* beta,
                        T eps, T* xhat, T* y, T* inv_std, Share share);
template <typename T>
void group_norm_backward(const GroupNormShape& shape, const GroupNormState<T>& state, const T* gy,
                         T* gx, bool accumulate, T* ggamma, T* gbeta, Share share);
template <typename T>
void group_norm_tangent(const GroupNormShape& shape, const GroupNormState<T>& state,
                        const GroupNormTangent<T>& tangent, const T* dx, const T* dbeta, T* dy,
                        Share share);
template <typename T>
void group_norm_backward_tangent(const GroupNormShape& shape, const GroupNormState<T>& state,
                                 const GroupNormTangent<T>& tangent, const T* gy, const T* dgy,
                                 const T* ggamma, const T* gbeta, T* dgx, bool accumulate,
                                 T* dggamma, T* dgbeta, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
