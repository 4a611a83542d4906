#include "gemm_tail.h"

#include <utility>

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// Rows of a tile: all its sums must fit one vector in the end, and every row keeps a pointer.
template <typename T, int C>
constexpr int kTileRows = kLanes<T> / C < 8 ? kLanes<T> / C : 8;

template <typename T, int... kLane>
FASTMAML_INLINE Vec<T> pair_sums(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  return shuffle<T, 2 * kLane...>(a, b) + shuffle<T, 2 * kLane + 1 ...>(a, b);
}

// Lane i of the result: the sum of all lanes of v[i], once `kWidth` lanes of it are left to add.
template <typename T, int kWidth = kLanes<T>, int N>
FASTMAML_INLINE Vec<T> lane_sums_of(const Vec<T> (&v)[N]) {
  if constexpr (kWidth == 1) {
    return v[0];
  } else {
    Vec<T> half[(N + 1) / 2];
#pragma GCC unroll 8
    for (int i = 0; i < (N + 1) / 2; ++i) {
      const int next = 2 * i + 1 < N ? 2 * i + 1 : 2 * i;
      half[i] = pair_sums<T>(v[2 * i], v[next], std::make_integer_sequence<int, kLanes<T>>());
    }
    return lane_sums_of<T, kWidth / 2>(half);
  }
}

template <typename T, int C, int R>
__attribute__((noinline)) void dot_tile(const RowProduct<T>& product, const std::int32_t* source,
                                        const std::int32_t* destination, Index first) {
  Vec<T> sum[R * C] = {};
  for (int t = 0; t < product.term_count; ++t) {
    const ProductTerm<T>& term = product.terms[t];
    const T* rows[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) rows[r] = term.a + row_of(source, first + r) * term.lda;
    for (int s = 0; s < product.segment_count; ++s) {
      const Segment segment = product.segments[s];
      const T* b = term.tail + segment.b_offset;
      const auto add = [&](Index at, auto load_at) __attribute__((always_inline)) {
        Vec<T> values[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) values[c] = load_at(b + c * product.tail_step);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<T> x = load_at(rows[r] + at);
#pragma GCC unroll 4
          for (int c = 0; c < C; ++c) sum[r * C + c] = fma(x, values[c], sum[r * C + c]);
        }
      };
      Index at = segment.a_offset;
      const Index end = at + segment.k;
      for (; at + kLanes<T> <= end; at += kLanes<T>, b += kLanes<T>) {
        add(at, [](const T* p) __attribute__((always_inline)) { return load(p); });
      }
      if (const int left = static_cast<int>(end - at)) {
        add(at, [left](const T* p) __attribute__((always_inline)) { return load_first(p, left); });
      }
    }
  }
  T sums[kLanes<T>];
  store(sums, lane_sums_of<T>(sum));
  const Index ld = product.ld;
  const bool accumulate = product.accumulate;
  const Vec<T> bias = product.bias ? load(product.bias + ld - kLanes<T>) : Vec<T>{};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    T* c = product.c + (row_of(destination, first + r) + 1) * ld - kLanes<T>;
    Vec<T> value = {};
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) value[i] = sums[r * C + i];
    value += bias;
    if (accumulate) value += load(c);
    store(c, value);
  }
}

template <typename T>
using DotTile = void (*)(const RowProduct<T>&, const std::int32_t*, const std::int32_t*, Index);
template <typename T, int C, int... R>
DotTile<T> pick_dot_tile(Index rows, std::integer_sequence<int, R...>) {
  static constexpr DotTile<T> kTiles[] = {&dot_tile<T, C, R + 1>...};
  return kTiles[rows - 1];
}

template <typename T, int C>
void dot_tiles(const RowProduct<T>& product, const std::int32_t* source,
               const std::int32_t* destination, Index first, Index rows) {
  const Index tiles = divide_up(rows, kTileRows<T, C>);
  const Parts parts(rows, tiles);
  for (Index i = 0; i < tiles; ++i) {
    const Range tile = parts[i];
    const auto run = pick_dot_tile<T, C>(tile.end - tile.begin,
                                         std::make_integer_sequence<int, kTileRows<T, C>>());
    run(product, source, destination, first + tile.begin);
  }
}

// V vectors of rows of c. Sums of several pairs at once: one alone would wait for itself.
template <typename T, int C, int V, bool kPaired>
__attribute__((noinline)) void tail_tile(const OuterProduct<T>& product, const Offsets* offsets,
                                         Range k, Index column) {
  constexpr int kAtOnce = V * C >= 8 ? 1 : 8 / (V * C);
  const int last = static_cast<int>(k.end - k.begin) - (V - 1) * kLanes<T>;
  Vec<T> sum[kAtOnce][C][V] = {};
  for (int t = 0; t < product.term_count; ++t) {
    const ProductTerm<T>& term = product.terms[t];
    const auto add = [&](Index i, Vec<T>(&to)[C][V]) __attribute__((always_inline)) {
      const T* a = term.a + k.begin + (kPaired ? offsets[i].a : i * term.lda);
      const T* b = term.b + column + (kPaired ? offsets[i].b : i * product.ld);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const T* values = a + v * kLanes<T>;
        const Vec<T> x = v + 1 < V ? load(values) : load_first(values, last);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) to[c][v] = fma(x, broadcast(b[c]), to[c][v]);
      }
    };
    Index i = 0;
    for (; i + kAtOnce <= product.rows; i += kAtOnce) {
#pragma GCC unroll 8
      for (int j = 0; j < kAtOnce; ++j) add(i + j, sum[j]);
    }
    for (; i < product.rows; ++i) add(i, sum[0]);
  }
  T columns[C][V * kLanes<T>];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
      for (int j = 1; j < kAtOnce; ++j) sum[0][c][v] += sum[j][c][v];
      store(columns[c] + v * kLanes<T>, sum[0][c][v]);
    }
  }
  for (Index row = 0; row < k.end - k.begin; ++row) {
    T* to = product.c + (k.begin + row) * product.ld + column;
    Vec<T> value = {};
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = columns[c][row];
    if (product.accumulate) value += load(to);
    store(to, value);
  }
}

template <typename T>
using DotTiles = void (*)(const RowProduct<T>&, const std::int32_t*, const std::int32_t*, Index,
                          Index);
template <typename T>
using TailTile = void (*)(const OuterProduct<T>&, const Offsets*, Range, Index);

template <typename T, int... C>
DotTiles<T> pick_dot_tiles(int tail, std::integer_sequence<int, C...>) {
  static constexpr DotTiles<T> kTiles[] = {&dot_tiles<T, C + 1>...};
  return kTiles[tail - 1];
}

template <typename T, bool kPaired, int... I>
TailTile<T> pick_tail_tile(int tail, Index vectors, std::integer_sequence<int, I...>) {
  static constexpr TailTile<T> kTiles[] = {
      &tail_tile<T, I / kTailVectors + 1, I % kTailVectors + 1, kPaired>...};
  return kTiles[(tail - 1) * kTailVectors + vectors - 1];
}

// A tile of rows of a against rows of b: all its sums fit one vector in the end.
template <typename T>
constexpr int kDotColumns = kLanes<T> >= 16 ? 4 : 2;
template <typename T>
constexpr int kDotRows = kLanes<T> / kDotColumns<T>;

// Of the tile's rows and columns `rows` and `columns` exist; others repeat the last.
template <typename T>
FASTMAML_INLINE void rows_tile(Index k, const T* a, Index lda, Index rows, const T* b, Index ldb,
                               Index columns, T* c, Index ldc) {
  constexpr int R = kDotRows<T>, C = kDotColumns<T>;
  const T *left[R], *right[C];
  for (int r = 0; r < R; ++r) left[r] = a + smaller(r, rows - 1) * lda;
  for (int i = 0; i < C; ++i) right[i] = b + smaller(i, columns - 1) * ldb;
  Vec<T> sum[R * C] = {};
  const auto add = [&](auto load_at) __attribute__((always_inline)) {
    Vec<T> values[C];
#pragma GCC unroll 4
    for (int i = 0; i < C; ++i) values[i] = load_at(right[i]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec<T> x = load_at(left[r]);
#pragma GCC unroll 4
      for (int i = 0; i < C; ++i) sum[r * C + i] = fma(x, values[i], sum[r * C + i]);
    }
  };
  Index at = 0;
  for (; at + kLanes<T> <= k; at += kLanes<T>) {
    add([at](const T* p) __attribute__((always_inline)) { return load(p + at); });
  }
  if (const int left_over = static_cast<int>(k - at)) {
    add([at, left_over](const T* p)
            __attribute__((always_inline)) { return load_first(p + at, left_over); });
  }
  T sums[kLanes<T>];
  store(sums, lane_sums_of<T>(sum));
  for (Index r = 0; r < rows; ++r) {
    for (Index i = 0; i < columns; ++i) c[r * ldc + i] = sums[r * C + i];
  }
}

}  // namespace

template <typename T>
void matmul_nt(Index rows, Index k, Index n, const T* a, Index lda, const T* b, Index ldb, T* c,
               Share share) {
  constexpr int R = kDotRows<T>, C = kDotColumns<T>;
  const Index ldc = padded_to_lanes<T>(n);
  const Range mine = split(divide_up(rows, R), share);
  for (Index tile = mine.begin; tile < mine.end; ++tile) {
    const Index first = tile * R, count = smaller(rows - first, R);
    for (Index j = 0; j < n; j += C) {
      rows_tile(k, a + first * lda, lda, count, b + j * ldb, ldb, smaller(n - j, C),
                c + first * ldc + j, ldc);
    }
    for (Index r = first; r < first + count; ++r) {
      for (Index j = n; j < ldc; ++j) c[r * ldc + j] = 0;
    }
  }
}

template <typename T>
void gather_tails(ProductTerm<T>* terms, int term_count, Index rows, Index n, int tail, T* buffer) {
  const Index ld = padded_to_lanes<T>(n);
  for (int t = 0; t < term_count; ++t) {
    terms[t].tail = buffer;
    for (const T* column = terms[t].b + n - tail; column < terms[t].b + n; ++column) {
      for (Index row = 0; row < rows; ++row) *buffer++ = column[row * ld];
    }
  }
}

template <typename T>
void multiply_tail_rows(const RowProduct<T>& product, const std::int32_t* source,
                        const std::int32_t* destination, Index first, Index rows) {
  const auto run = pick_dot_tiles<T>(product.tail, std::make_integer_sequence<int, kMostTail<T>>());
  run(product, source, destination, first, rows);
}

template <typename T>
void multiply_tail_outer(const OuterProduct<T>& product, const Offsets* offsets, Range k,
                         Index column, int tail) {
  const auto kinds = std::make_integer_sequence<int, kMostTail<T> * kTailVectors>();
  const Index vectors = divide_up(k.end - k.begin, kLanes<T>);
  const auto run = offsets ? pick_tail_tile<T, true>(tail, vectors, kinds)
                           : pick_tail_tile<T, false>(tail, vectors, kinds);
  run(product, offsets, k, column);
}

#define FASTMAML_INSTANTIATE(T)                                                                 \
  template void matmul_nt<T>(Index, Index, Index, const T*, Index, const T*, Index, T*, Share); \
  template void gather_tails<T>(ProductTerm<T>*, int, Index, Index, int, T*);                   \
  template void multiply_tail_rows<T>(const RowProduct<T>&, const std::int32_t*,                \
                                      const std::int32_t*, Index, Index);                       \
  template void multiply_tail_outer<T>(const OuterProduct<T>&, const Offsets*, Range, Index, int);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
