// Small networks with a task in each lane of a vector; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void lane_products(const LaneProducts<T>& job);
template <typename T>
void lane_sums(Index count, int tasks, T factor, const T* a, const T* b, T* out, bool accumulate);
template <typename T>
void lane_loss_gradient(Loss kind, Index rows, Index columns, const T* y, const T* targets, T* gy,
                        T* losses);
template <typename T>
void lane_loss_tangent(Loss kind, Index rows, Index columns, const T* y, const T* dy, T* dgy);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
