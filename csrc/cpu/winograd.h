// Convolutions with a 3x3 kernel and stride 1 by Winograd's minimal filtering F(2x2, 3x3)
// (Lavin & Gray, "Fast algorithms for convolutional neural networks", CVPR 2016): tiles of 2x2
// outputs take 16 multiplications per pair of channels instead of 36,
//
//   y = A' [(G w G') . (B' x B)] A        and, its adjoint,   gw = G' [(B' x B) . (A gy A')] G
//
// where the products in the middle are sums over channels, or over tiles: plain matrix products.
#pragma once

#include "conv_lines.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// Whether the saved multiplications pay for the transforms, with `k` channels to multiply in rows
// of `ld` elements.
template <typename T>
bool winograd_serves(const ConvGeometry& g, Index images, Index k, Index ld);
template <typename T>
void winograd_sweep(const LineSweep<T>& sweep, Share share);
template <typename T>
void winograd_weight_grad(const ConvPlan& plan, const ProductTerm<T> (&terms)[2], int term_count,
                          T* gw, bool accumulate, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
