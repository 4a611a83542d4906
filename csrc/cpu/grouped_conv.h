// Convolution of groups of channels, each with weights of its own; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void grouped_conv_sweep(const GroupedSweep& sweep, Index images, const T* x, const T* w,
                        const T* x2, const T* w2, const T* bias, T* y, bool accumulate,
                        Share share);
template <typename T>
void grouped_conv_weight_grad(const GroupedSweep& forward, Index images, const T* x, const T* gy,
                              const T* x2, const T* gy2, T* gw, bool accumulate, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
