// Convolution as implicit matrix products over lists of rows (see conv_plan.h).
#pragma once

#include "conv_plan.h"
#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
ConvPlan* conv_plan(const ConvGeometry& geometry, Index images);
template <typename T>
void conv_forward(const ConvPlan& plan, const T* x, Index ldx, const T* w, const T* x2, const T* w2,
                  const T* bias, T* y, Share share);
template <typename T>
void conv_input_grad(const ConvPlan& plan, const T* gy, const T* wt, const T* gy2, const T* wt2,
                     T* gx, bool accumulate, Share share);
template <typename T>
void conv_weight_grad(const ConvPlan& plan, const T* x, Index ldx, const T* gy, const T* x2,
                      const T* gy2, T* gw, bool accumulate, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
