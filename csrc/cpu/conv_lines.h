// Convolutions that step through an image's lines one column at a time: a value that is loaded is
// multiplied with every tap of a kernel line before it is dropped. Worth it where vectors of output
// channels are too few to keep the multipliers busy otherwise.
#pragma once

#include "conv_plan.h"
#include "gemm.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// y[h][w] = bias + sum over taps of x[h + tap_h * dilation_h - pad_h][w + tap_w - pad_w] weights.
template <typename T>
struct LineSweep {
  ProductTerm<T> terms[2];
  int term_count;
  Index images, k, columns;  // k channels in, `columns` (padded) out
  Index vectors;             // of those columns, from the first: what is swept
  int in_height, in_width, out_height, out_width;
  int kernel_h, pad_h, pad_w, dilation_h;
  bool flipped;  // weights are stored last tap first
  const T* bias;
  T* out;
  bool accumulate;
};

// Whether line tiles serve this geometry with this many output channels (padded).
template <typename T>
bool sweeps_by_line(const ConvGeometry& g, int out_width, Index columns);
template <typename T>
void sweep_lines(const LineSweep<T>& sweep, Share share);

template <typename T>
bool weight_grad_by_line(const ConvGeometry& g);
template <typename T>
void weight_grad_lines(const ConvPlan& plan, const ProductTerm<T> (&terms)[2], int term_count,
                       T* gw, bool accumulate, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
