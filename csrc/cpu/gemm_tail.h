// Columns of a product that are too few for a vector of their own: with vectors along the columns
// most lanes would multiply padding. So these columns are taken apart, with vectors along k.
#pragma once

#include "gemm.h"

namespace fastmaml {
namespace FASTMAML_ISA {

// Columns at most: narrower vectors gain less.
constexpr int kTailShare = FASTMAML_VECTOR_BYTES == 64 ? 4 : 8;
template <typename T>
constexpr int kMostTail = kLanes<T> / kTailShare > 0 ? kLanes<T> / kTailShare : 1;
constexpr Index kTailElements = 4096;  // of the columns that are gathered for one term

// Whether sums over `depth` products are worth adding up the lanes of their vectors.
FASTMAML_INLINE bool deep_enough(int tail, Index depth) {
  return depth >= (8 + 8 * tail) * (64 / FASTMAML_VECTOR_BYTES);
}

// How many of n columns to take apart: those of the last vector if they are few, and if `rows` rows
// of sums over `depth` products each are enough work; or none.
template <typename T>
FASTMAML_INLINE int tail_columns(Index n, Index rows, Index depth) {
  constexpr Index kLeastRows = 8;
  const int tail = static_cast<int>(n % kLanes<T>);
  const bool few = tail * kTailShare <= kLanes<T>;
  return few && rows >= kLeastRows && deep_enough(tail, depth) ? tail : 0;
}

// The columns of an outer product.
template <typename T>
FASTMAML_INLINE Columns columns_of(Index n, Index rows, Index depth) {
  const int tail = tail_columns<T>(n, rows, depth);
  return {tail > 0 ? n / kLanes<T> : divide_up(n, kLanes<T>), tail};
}

// The tail of a row product, whose columns are gathered in a buffer of kTailElements, and whose
// products lie in runs of `run`: what whole vectors leave of a run is cheap with AVX-512 only.
template <typename T>
FASTMAML_INLINE int gathered_columns(Index n, Index rows, Index depth, Index run) {
  constexpr Index kLeastRun = FASTMAML_VECTOR_BYTES == 64 ? 1 : 2 * kLanes<T>;
  const int tail = tail_columns<T>(n, rows, depth);
  return run >= kLeastRun && tail * depth <= kTailElements ? tail : 0;
}

// Copies the last columns of each term's b, `tail` of n, one after the other to `buffer`.
template <typename T>
void gather_tails(ProductTerm<T>* terms, int term_count, Index rows, Index n, int tail, T* buffer);

// The last vector of c's columns, for products with a tail; arguments as for multiply_rows.
template <typename T>
void multiply_tail_rows(const RowProduct<T>& product, const std::int32_t* source,
                        const std::int32_t* destination, Index first, Index rows);

// Rows [k.begin, k.end) of c, columns [column, column + tail) and the padding behind them.
template <typename T>
void multiply_tail_outer(const OuterProduct<T>& product, const Offsets* offsets, Range k,
                         Index column, int tail);
constexpr int kTailVectors = 4;  // along k, at most

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
