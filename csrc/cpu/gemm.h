// The two register-tiled products everything dense is made of.
#pragma once

#include "row_pair.h"
#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

FASTMAML_INLINE Index row_of(const std::int32_t* list, Index i) { return list ? list[i] : i; }

// `k` consecutive elements of a row of a against `k` consecutive rows of b.
struct Segment {
  Index a_offset, b_offset, k;
};

template <typename T>
struct ProductTerm {
  const T* a;
  Index lda;
  const T* b;
  const T* tail = nullptr;  // the last columns of b, each in one piece (see gemm_tail.h)
};

// c[destination row] = (accumulate ? c : 0) + bias + sum over terms and segments of
// a[source row] b. Rows of b and c have `ld` elements.
template <typename T>
struct RowProduct {
  ProductTerm<T> terms[2];
  int term_count;
  const Segment* segments;
  int segment_count;
  const T* bias;
  T* c;
  Index ld;
  bool accumulate;
  int tail = 0;         // columns in the last vector, where they are taken apart
  Index tail_step = 0;  // elements of one
};

// Rows `first ... first + rows` of the lists, or of the matrices where the lists are null;
// vectors [columns.begin, columns.end) of c.
template <typename T>
void multiply_rows(const RowProduct<T>& product, const std::int32_t* source,
                   const std::int32_t* destination, Index first, Index rows, Range columns);

// c[i][:] = (accumulate ? c : 0) + sum over row pairs of a[pair.a][i] b[pair.b][:].
// Null pairs: rows 0 ... rows of both; otherwise both terms have the same lda.
template <typename T>
struct OuterProduct {
  ProductTerm<T> terms[2];
  int term_count;
  const RowPair* pairs;
  Index rows;
  T* c;
  Index ld;
  bool accumulate;
};

// Where the rows of a pair start, in elements.
struct Offsets {
  Index a, b;
};

// Columns of an outer product: `vectors` of them, and in another one a tail that is taken apart.
struct Columns {
  Index vectors;
  int tail;
};

// An outer product with k rows of c is outer_units(k, ...) tiles, computed in any order.
template <typename T>
Index outer_units(Index k, Columns columns);
template <typename T>
void multiply_outer(const OuterProduct<T>& product, Index k, Columns columns, Range units);

// Vectors of c that one tile spans, at most; with AVX2 three, where two would leave one alone.
constexpr int kPanel = kManyRegisters ? 4 : 2;
constexpr int kPanelRows = kFused ? 6 : 4;  // rows of such a tile

// [0, vectors) in panels, as even as can be.
FASTMAML_INLINE Index panel_count(Index vectors) {
  if (FASTMAML_VECTOR_BYTES == 32) return larger(vectors / kPanel, 1);
  return divide_up(vectors, kPanel);
}
FASTMAML_INLINE Range panel(Index vectors, Index which) {
  return Parts(vectors, panel_count(vectors))[which];
}

template <typename T>
void matmul(Index rows, Index k, Index n, const T* a, Index lda, const T* b, const T* a2,
            Index lda2, const T* b2, const T* bias, T* c, bool accumulate, Share share);
template <typename T>
void matmul_tn(Index rows, Index k, Index n, const T* a, Index lda, const T* b, const T* a2,
               Index lda2, const T* b2, T* c, bool accumulate, Share share);
template <typename T>
void matmul_nt(Index rows, Index k, Index n, const T* a, Index lda, const T* b, Index ldb, T* c,
               Share share);
template <typename T>
void column_sums(Index rows, Index n, const T* a, T* out, bool accumulate, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
