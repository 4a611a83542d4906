// Batch normalisation over rows; see kernels.h for what each function computes.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void norm_forward(Index rows, Index channels, const T* x, const T* gamma, const T* beta, T eps,
                  T* xhat, T* y, T* mean, T* variance, T* inv_std, Share share);
template <typename T>
void norm_backward(Index rows, Index channels, const T* gy, const T* xhat, const T* gamma,
                   const T* inv_std, T* gx, bool accumulate, T* ggamma, T* gbeta, Share share);
template <typename T>
void norm_tangent(Index rows, Index channels, const T* dx, const T* xhat, const T* gamma,
                  const T* dgamma, const T* dbeta, const T* inv_std, T* dxhat, T* dy, T* m,
                  Share share);
template <typename T>
void norm_backward_tangent(Index rows, Index channels, const T* gy, const T* dgy, const T* xhat,
                           const T* dxhat, const T* gamma, const T* dgamma, const T* inv_std,
                           const T* m, const T* ggamma, const T* gbeta, T* dgx, bool accumulate,
                           T* dggamma, T* dgbeta, Share share);
template <typename T>
void norm_eval_forward(Index rows, Index channels, const T* x, const T* mean, const T* variance,
                       T eps, const T* gamma, const T* beta, T* xhat, T* y, T* inv_std,
                       Share share);
template <typename T>
void norm_eval_backward(Index rows, Index channels, const T* gy, const T* xhat, const T* gamma,
                        const T* inv_std, T* gx, bool accumulate, T* ggamma, T* gbeta, Share share);
template <typename T>
void norm_eval_tangent(Index rows, Index channels, const T* dx, const T* xhat, const T* gamma,
                       const T* dgamma, const T* dbeta, const T* inv_std, T* dxhat, T* dy,
                       Share share);
template <typename T>
void norm_eval_backward_tangent(Index rows, Index channels, const T* gy, const T* dgy,
                                const T* xhat, const T* dxhat, const T* gamma, const T* dgamma,
                                const T* inv_std, T* dgx, bool accumulate, T* dggamma, T* dgbeta,
                                Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
