// Pooling over lists of windows; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void max_pool_forward(const PoolGeometry& geometry, Index images, Index ld, const T* x, T* y,
                      std::int32_t* argmax, Share share);
template <typename T>
void max_pool_backward(const PoolGeometry& geometry, Index images, Index ld,
                       const std::int32_t* argmax, const T* gy, T* gx, bool accumulate,
                       Share share);
template <typename T>
void max_pool_tangent(const PoolGeometry& geometry, Index images, Index ld,
                      const std::int32_t* argmax, const T* dx, T* dy, Share share);
template <typename T>
void avg_pool_forward(const PoolGeometry& geometry, Index images, Index ld, Index ldx, const T* x,
                      T* y, Share share);
template <typename T>
void avg_pool_backward(const PoolGeometry& geometry, Index images, Index ld, const T* gy, T* gx,
                       bool accumulate, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
