#include "gemm.h"

#include <utility>

#include "gemm_tail.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// Rows of a tile by the vectors it spans: accumulators, one row of b and a broadcast value share
// the registers, and every row of a keeps a pointer of its own in `row_tile`.
constexpr int kRowTile[] = {0, kFused ? 12 : 6,
                            kManyRegisters ? 12
                            : kFused       ? 6
                                           : 4,
                            kManyRegisters ? 8 : 4, 6};
constexpr int kOuterTile[] = {0, kFused ? 12 : 6,
                              kManyRegisters ? 14
                              : kFused       ? 6
                                             : 4,
                              kManyRegisters ? 9 : 4, 6};

constexpr Index kCacheBytes = 24 * 1024;  // what a loop may keep in half of a small L1 cache
constexpr Index kPairs = 256;             // row pairs whose offsets are worked out at once
constexpr Index kOuterRows = 96;          // rows of an outer product between updates of c

template <typename T, int R, int NV>
__attribute__((noinline)) void row_tile(const RowProduct<T>& product, const std::int32_t* source,
                                        const std::int32_t* destination, Index first,
                                        Index column) {
  Vec<T> sum[R][NV] = {};
  const Index ld = product.ld;
  for (int t = 0; t < product.term_count; ++t) {
    const ProductTerm<T>& term = product.terms[t];
    const T* rows[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) rows[r] = term.a + row_of(source, first + r) * term.lda;
    for (int s = 0; s < product.segment_count; ++s) {
      const Segment segment = product.segments[s];
      const T* a[R];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) a[r] = rows[r] + segment.a_offset;
      const T* b = term.b + segment.b_offset * ld + column;
#pragma GCC unroll 4
      for (Index k = 0; k < segment.k; ++k, b += ld) {
        Vec<T> values[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) values[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Vec<T> x = broadcast(a[r][k]);
#pragma GCC unroll 4
          for (int j = 0; j < NV; ++j) sum[r][j] = fma(x, values[j], sum[r][j]);
        }
      }
    }
  }
  // Read before c is written, which might overlap `product` for all the compiler knows.
  T* out = product.c + column;
  const bool accumulate = product.accumulate;
  Vec<T> bias[NV] = {};
#pragma GCC unroll 4
  for (int j = 0; j < NV; ++j) {
    if (product.bias) bias[j] = load(product.bias + column + j * kLanes<T>);
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    T* c = out + row_of(destination, first + r) * ld;
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      Vec<T> value = sum[r][j] + bias[j];
      if (accumulate) value += load(c + j * kLanes<T>);
      store(c + j * kLanes<T>, value);
    }
  }
}

template <typename T, int R, int NV, bool kPaired>
__attribute__((noinline)) void outer_tile(const OuterProduct<T>& product, const Offsets* offsets,
                                          Index first, Index column) {
  Vec<T> sum[R][NV] = {};
  for (int t = 0; t < product.term_count; ++t) {
    const ProductTerm<T>& term = product.terms[t];
    const T* a = term.a + first;
    const T* b = term.b + column;
#pragma GCC unroll 2
    for (Index i = 0; i < product.rows; ++i) {
      const T* x = a + (kPaired ? offsets[i].a : i * term.lda);
      const T* y = b + (kPaired ? offsets[i].b : i * product.ld);
      Vec<T> values[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) values[j] = load(y + j * kLanes<T>);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec<T> scale = broadcast(x[r]);
#pragma GCC unroll 4
        for (int j = 0; j < NV; ++j) sum[r][j] = fma(scale, values[j], sum[r][j]);
      }
    }
  }
  T* c = product.c + first * product.ld + column;
  const Index ld = product.ld;
  const bool accumulate = product.accumulate;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, c += ld) {
#pragma GCC unroll 4
    for (int j = 0; j < NV; ++j) {
      Vec<T> value = sum[r][j];
      if (accumulate) value += load(c + j * kLanes<T>);
      store(c + j * kLanes<T>, value);
    }
  }
}

template <typename T>
using RowTile = void (*)(const RowProduct<T>&, const std::int32_t*, const std::int32_t*, Index,
                         Index);
template <typename T>
using OuterTile = void (*)(const OuterProduct<T>&, const Offsets*, Index, Index);

template <typename T, int NV, int... R>
RowTile<T> pick_row_tile(Index rows, std::integer_sequence<int, R...>) {
  static constexpr RowTile<T> kTiles[] = {&row_tile<T, R + 1, NV>...};
  return kTiles[rows - 1];
}
template <typename T, int NV, bool kPaired, int... R>
OuterTile<T> pick_outer_tile(Index rows, std::integer_sequence<int, R...>) {
  static constexpr OuterTile<T> kTiles[] = {&outer_tile<T, R + 1, NV, kPaired>...};
  return kTiles[rows - 1];
}

template <typename T, int NV>
void row_panel(const RowProduct<T>& product, const std::int32_t* source,
               const std::int32_t* destination, Index first, Index rows, Index column) {
  const Index tiles = divide_up(rows, kRowTile[NV]);
  const Parts parts(rows, tiles);
  for (Index i = 0; i < tiles; ++i) {
    const Range tile = parts[i];
    const auto run = pick_row_tile<T, NV>(tile.end - tile.begin,
                                          std::make_integer_sequence<int, kRowTile[NV]>());
    run(product, source, destination, first + tile.begin, column);
  }
}

template <typename T, int NV>
void outer_panel(const OuterProduct<T>& product, const Offsets* offsets, Range k, Index column) {
  const auto sizes = std::make_integer_sequence<int, kOuterTile[NV]>();
  const Index rows = k.end - k.begin;
  const auto run = product.pairs ? pick_outer_tile<T, NV, true>(rows, sizes)
                                 : pick_outer_tile<T, NV, false>(rows, sizes);
  run(product, offsets, k.begin, column);
}

Index outer_tile_count(Index k, Index vectors) {
  if (vectors == 0) return 0;
  const Index widest = divide_up(vectors, panel_count(vectors));
  return divide_up(k, kOuterTile[widest]);
}

// Tiles of whole vectors, of which outer_tile_count(...) make a panel.
template <typename T>
void outer_tiles(const OuterProduct<T>& product, const Offsets* offsets, Index k, Index vectors,
                 Range units) {
  const Index tiles = outer_tile_count(k, vectors);
  const Parts tile(k, tiles), panels(vectors, panel_count(vectors));
  Index p = units.begin == 0 ? 0 : units.begin / tiles, t = units.begin - p * tiles;
  for (Index unit = units.begin; unit < units.end; ++unit) {
    const Range span = panels[p], rows = tile[t];
    const Index column = span.begin * kLanes<T>;
    if (++t == tiles) {
      t = 0;
      ++p;
    }
    switch (span.end - span.begin) {
      case 1:
        outer_panel<T, 1>(product, offsets, rows, column);
        break;
      case 2:
        outer_panel<T, 2>(product, offsets, rows, column);
        break;
#if FASTMAML_VECTOR_BYTES > 16 || FASTMAML_REGISTERS == 32
      case 3:
        outer_panel<T, 3>(product, offsets, rows, column);
        break;
#endif
#if FASTMAML_REGISTERS == 32
      case 4:
        outer_panel<T, 4>(product, offsets, rows, column);
        break;
#endif
    }
  }
}

template <typename T>
Index tail_tile_count(Index k, int tail) {
  return tail > 0 ? divide_up(k, kTailVectors * kLanes<T>) : 0;
}

template <typename T>
void tail_tiles(const OuterProduct<T>& product, const Offsets* offsets, Index k, Columns columns,
                Range units) {
  const Parts parts(k, tail_tile_count<T>(k, columns.tail));
  for (Index unit = units.begin; unit < units.end; ++unit) {
    multiply_tail_outer(product, offsets, parts[unit], columns.vectors * kLanes<T>, columns.tail);
  }
}

template <typename T>
void outer_part(const OuterProduct<T>& product, const Offsets* offsets, Index k, Columns columns,
                Range units) {
  const Index whole = outer_tile_count(k, columns.vectors) * panel_count(columns.vectors);
  if (units.begin < whole) {
    outer_tiles(product, offsets, k, columns.vectors, {units.begin, smaller(units.end, whole)});
  }
  tail_tiles(product, offsets, k, columns, {larger(units.begin - whole, 0), units.end - whole});
}

}  // namespace

template <typename T>
void multiply_rows(const RowProduct<T>& product, const std::int32_t* source,
                   const std::int32_t* destination, Index first, Index rows, Range columns) {
  if (rows <= 0) return;
  const bool with_tail = product.tail > 0 && columns.end * kLanes<T> == product.ld;
  if (with_tail) multiply_tail_rows(product, source, destination, first, rows);
  const Index vectors = columns.end - columns.begin - (with_tail ? 1 : 0);
  const Index count = panel_count(vectors);
  const Parts panels(vectors, count);
  for (Index p = 0; p < count; ++p) {
    const Range span = panels[p];
    const Index column = (columns.begin + span.begin) * kLanes<T>;
    switch (span.end - span.begin) {
      case 1:
        row_panel<T, 1>(product, source, destination, first, rows, column);
        break;
      case 2:
        row_panel<T, 2>(product, source, destination, first, rows, column);
        break;
#if FASTMAML_VECTOR_BYTES > 16 || FASTMAML_REGISTERS == 32
      case 3:
        row_panel<T, 3>(product, source, destination, first, rows, column);
        break;
#endif
#if FASTMAML_REGISTERS == 32
      case 4:
        row_panel<T, 4>(product, source, destination, first, rows, column);
        break;
#endif
    }
  }
}

template <typename T>
Index outer_units(Index k, Columns columns) {
  return outer_tile_count(k, columns.vectors) * panel_count(columns.vectors) +
         tail_tile_count<T>(k, columns.tail);
}

template <typename T>
void multiply_outer(const OuterProduct<T>& product, Index k, Columns columns, Range units) {
  if (!product.pairs) return outer_part(product, nullptr, k, columns, units);
  Offsets offsets[kPairs];
  OuterProduct<T> part = product;
  for (Index first = 0; first == 0 || first < product.rows; first += kPairs) {
    part.rows = smaller(product.rows - first, kPairs);
    part.accumulate = product.accumulate || first > 0;
    for (Index i = 0; i < part.rows; ++i) {
      const RowPair pair = product.pairs[first + i];
      offsets[i] = {pair.a * product.terms[0].lda, pair.b * product.ld};
    }
    outer_part(part, offsets, k, columns, units);
  }
}

template <typename T>
void matmul(Index rows, Index k, Index n, const T* a, Index lda, const T* b, const T* a2,
            Index lda2, const T* b2, const T* bias, T* c, bool accumulate, Share share) {
  const Index ld = padded_to_lanes<T>(n), vectors = ld / kLanes<T>;
  const bool by_rows = rows >= share.parts * kRowTile[kPanel];
  const Range mine = split(by_rows ? rows : vectors, share);
  const Range row_range = by_rows ? mine : Range{0, rows};
  const Range columns = by_rows ? Range{0, vectors} : mine;
  // Several passes over c pay off only where the rows reuse what they bring into the cache.
  const Index panel_row = smaller(vectors, kPanel) * FASTMAML_VECTOR_BYTES;
  const Index chunk = rows > 2 * kRowTile[1] ? larger(kCacheBytes / panel_row, 1) : k;
  const Index chunks = chunk >= k ? 1 : divide_up(k, chunk);
  const Parts parts(k, chunks);
  ProductTerm<T> terms[2] = {{a, lda, b}, {a2, lda2, b2}};
  const int term_count = a2 ? 2 : 1, tail = gathered_columns<T>(n, rows, k, k);
  T tails[2 * kTailElements];
  gather_tails(terms, term_count, k, n, tail, tails);
  for (Index i = 0; i < chunks; ++i) {
    const Range part = parts[i];
    const Segment segment = {part.begin, part.begin, part.end - part.begin};
    const RowProduct<T> product = {
        {terms[0], terms[1]}, term_count, &segment, 1, i == 0 ? bias : nullptr, c, ld,
        accumulate || i > 0,  tail,       k};
    multiply_rows(product, nullptr, nullptr, row_range.begin, row_range.end - row_range.begin,
                  columns);
  }
}

template <typename T>
void matmul_tn(Index rows, Index k, Index n, const T* a, Index lda, const T* b, const T* a2,
               Index lda2, const T* b2, T* c, bool accumulate, Share share) {
  const Index ld = padded_to_lanes<T>(n);
  const Columns columns = columns_of<T>(n, k, rows);
  const Range units = split(outer_units<T>(k, columns), share);
  const Index blocks = larger(divide_up(rows, kOuterRows), 1);
  const Parts in_blocks(rows, blocks);
  for (Index i = 0; i < blocks; ++i) {
    const Range block = in_blocks[i];
    const OuterProduct<T> product = {
        {{a + block.begin * lda, lda, b + block.begin * ld},
         {a2 ? a2 + block.begin * lda2 : nullptr, lda2, b2 ? b2 + block.begin * ld : nullptr}},
        a2 ? 2 : 1,
        nullptr,
        block.end - block.begin,
        c,
        ld,
        accumulate || i > 0};
    multiply_outer(product, k, columns, units);
  }
}

template <typename T>
void column_sums(Index rows, Index n, const T* a, T* out, bool accumulate, Share share) {
  const Index ld = padded_to_lanes<T>(n);
  const Range mine = split(ld / kLanes<T>, share);
  for (Index column = mine.begin * kLanes<T>; column < mine.end * kLanes<T>; column += kLanes<T>) {
    Vec<T> total = {};
    for (Index first = 0; first < rows; first += kOuterRows) {  // in blocks: rounding grows slower
      const Index last = smaller(first + kOuterRows, rows);
      Vec<T> even = {}, odd = {};
      Index row = first;
      for (; row + 1 < last; row += 2) {
        even += load(a + row * ld + column);
        odd += load(a + (row + 1) * ld + column);
      }
      if (row < last) even += load(a + row * ld + column);
      total += even + odd;
    }
    if (accumulate) total += load(out + column);
    store(out + column, total);
  }
}

#define FASTMAML_INSTANTIATE(T)                                                                  \
  template void multiply_rows<T>(const RowProduct<T>&, const std::int32_t*, const std::int32_t*, \
                                 Index, Index, Range);                                           \
  template Index outer_units<T>(Index, Columns);                                                 \
  template void multiply_outer<T>(const OuterProduct<T>&, Index, Columns, Range);                \
  template void matmul<T>(Index, Index, Index, const T*, Index, const T*, const T*, Index,       \
                          const T*, const T*, T*, bool, Share);                                  \
  template void matmul_tn<T>(Index, Index, Index, const T*, Index, const T*, const T*, Index,    \
                             const T*, T*, bool, Share);                                         \
  template void column_sums<T>(Index, Index, const T*, T*, bool, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
