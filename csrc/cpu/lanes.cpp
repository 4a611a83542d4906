#include "lanes.h"

#include <utility>

#include "vector_math.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// A tile's sums stay in registers, with its columns of b: of 32, or of 16.
constexpr int kTileRows = kManyRegisters ? 6 : 3;
constexpr int kTileColumns = kManyRegisters ? 4 : 3;

// Of a shared matrix an element is one number.
template <bool kShared, typename T>
constexpr Index kElement = kShared ? 1 : kLanes<T>;
template <bool kShared, typename T>
FASTMAML_INLINE Vec<T> load_element(const T* p) {
  if constexpr (kShared) return broadcast(*p);
  return load(p);
}

template <bool kShared, typename T, int kRows, int kColumns>
FASTMAML_INLINE void add_product(const LaneProduct<T>& product, Index i, Index j,
                                 Vec<T> (&sums)[kRows][kColumns]) {
  constexpr Index kB = kElement<kShared, T>;
  const Index a_row = product.a.row * kLanes<T>, a_next = product.a.column * kLanes<T>;
  const Index b_column = product.b.column * kB, b_next = product.b.row * kB;
  const T *a = product.a.at + i * a_row, *b = product.b.at + j * b_column;
  for (Index k = product.depth; k > 0; --k) {
    Vec<T> factors[kColumns];
    for (int c = 0; c < kColumns; ++c) factors[c] = load_element<kShared>(b + c * b_column);
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> factor = load(a + r * a_row);
      for (int c = 0; c < kColumns; ++c) sums[r][c] = fma(factor, factors[c], sums[r][c]);
    }
    a += a_next;
    b += b_next;
  }
}

template <bool kShared, typename T, int kRows, int kColumns>
FASTMAML_INLINE void add_base(const LaneMatrix<T>& base, Index i, Index j,
                              Vec<T> (&sums)[kRows][kColumns]) {
  constexpr Index kB = kElement<kShared, T>;
  const Index row = base.row * kB, column = base.column * kB;
  const T* at = base.at + i * row + j * column;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      sums[r][c] += load_element<kShared>(at + r * row + c * column);
    }
  }
}

template <typename T, int kRows, int kColumns>
FASTMAML_INLINE void scale(const LaneProducts<T>& job, Index i, Index j,
                           Vec<T> (&sums)[kRows][kColumns]) {
  const T *rates = job.rates, factor = job.factor;
  const Index row = job.rates_row;
  if (rates != nullptr) rates += i * row + j;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      sums[r][c] *= broadcast(rates == nullptr ? factor : factor * rates[r * row + c]);
    }
  }
}

template <typename T, int kRows, int kColumns>
FASTMAML_INLINE void store_tile(const LaneProducts<T>& job, Index i, Index j,
                                const Vec<T> (&sums)[kRows][kColumns]) {
  const Index row = job.columns * kLanes<T>;
  T* out = job.out + i * row + j * kLanes<T>;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) store(out + r * row + c * kLanes<T>, sums[r][c]);
  }
}

template <typename T, int kRows, int kColumns>
void tile(const LaneProducts<T>& job, Index i, Index j) {
  Vec<T> sums[kRows][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sums[r][c] = Vec<T>{};
  }
  for (int p = 0; p < job.count; ++p) {
    const LaneProduct<T>& product = job.products[p];
    if (product.b.shared) {
      add_product<true>(product, i, j, sums);
    } else {
      add_product<false>(product, i, j, sums);
    }
  }
  if (job.factor != T(1) || job.rates != nullptr) scale(job, i, j, sums);
  if (job.base.at != nullptr && job.base.shared) add_base<true>(job.base, i, j, sums);
  if (job.base.at != nullptr && !job.base.shared) add_base<false>(job.base, i, j, sums);
  store_tile(job, i, j, sums);
}

template <typename T>
using Tile = void (*)(const LaneProducts<T>&, Index, Index);
template <typename T>
struct TileTable {
  Tile<T> by_size[kTileRows * kTileColumns];
};
template <typename T, std::size_t... kSizes>
constexpr TileTable<T> tile_table(std::index_sequence<kSizes...>) {
  return {{&tile<T, kSizes / kTileColumns + 1, kSizes % kTileColumns + 1>...}};
}
template <typename T>
constexpr TileTable<T> kTiles = tile_table<T>(std::make_index_sequence<kTileRows * kTileColumns>());

// Lane l of the result: the sum of a's lanes l and l ^ kHalf where l has no bit kHalf, else of b's.
template <int kHalf, typename T, int... kLane>
FASTMAML_INLINE Vec<T> fold(Vec<T> a, Vec<T> b, std::integer_sequence<int, kLane...>) {
  constexpr int kB = kLanes<T>;
  return shuffle<T, ((kLane & kHalf) == 0 ? kLane : kLane + kB)...>(a, b) +
         shuffle<T, ((kLane & kHalf) == 0 ? kLane ^ kHalf : (kLane ^ kHalf) + kB)...>(a, b);
}

// Lane l of the result: the sum of all lanes of vectors[l].
template <int kCount, typename T>
FASTMAML_INLINE Vec<T> sums_of_lanes(Vec<T>* vectors) {
  if constexpr (kCount == 1) {
    return vectors[0];
  } else {
    constexpr int kHalf = kLanes<T> / kCount;
    for (int i = 0; i < kCount / 2; ++i) {
      vectors[i] = fold<kHalf, T>(vectors[2 * i], vectors[2 * i + 1],
                                  std::make_integer_sequence<int, kLanes<T>>());
    }
    return sums_of_lanes<kCount / 2, T>(vectors);
  }
}

template <typename T>
FASTMAML_INLINE MaskVec<T> first_lanes(int count) {
  MaskVec<T> mask;
  for (int l = 0; l < kLanes<T>; ++l) mask[l] = l < count ? -1 : 0;
  return mask;
}

// Writes the softmax over columns and returns the logarithm of its denominator, shift included.
template <typename T>
FASTMAML_INLINE Vec<T> softmax(Index columns, const T* y, T* out) {
  Vec<T> highest = load(y), sum = {};
  for (Index c = 1; c < columns; ++c) {
    const Vec<T> here = load(y + c * kLanes<T>);
    highest = select<T>(here > highest, here, highest);
  }
  for (Index c = 0; c < columns; ++c) {
    const Vec<T> e = vector_exp<T>(load(y + c * kLanes<T>) - highest);
    sum += e;
    store(out + c * kLanes<T>, e);
  }
  for (Index c = 0; c < columns; ++c) {
    store(out + c * kLanes<T>, load(out + c * kLanes<T>) / sum);
  }
  return highest + vector_log<T>(sum);
}

template <typename T>
void cross_entropy_gradient(Index rows, Index columns, const T* y, const T* targets, T* gy,
                            T* losses) {
  const Vec<T> scale = broadcast(1 / static_cast<T>(rows));
  Vec<T> total = {};
  for (Index i = 0; i < rows; ++i) {
    const Index at = i * columns * kLanes<T>;
    Vec<T> loss = softmax(columns, y + at, gy + at);
    for (Index j = at; j < at + columns * kLanes<T>; j += kLanes<T>) {
      const Vec<T> target = load(targets + j);
      loss -= select<T>(target > Vec<T>{}, load(y + j), Vec<T>{});
      store(gy + j, (load(gy + j) - target) * scale);
    }
    total += loss;
  }
  store(losses, total * scale);
}

template <typename T>
void squared_error_gradient(Index count, const T* y, const T* targets, T* gy, T* losses) {
  const T scale = 1 / static_cast<T>(count);
  Vec<T> total = {};
  for (Index j = 0; j < count * kLanes<T>; j += kLanes<T>) {
    const Vec<T> error = load(y + j) - load(targets + j);
    total = fma(error, error, total);
    store(gy + j, broadcast(2 * scale) * error);
  }
  store(losses, total * broadcast(scale));
}

}  // namespace

template <typename T>
void lane_products(const LaneProducts<T>& job) {
  const Index down = divide_up(job.rows, kTileRows), across = divide_up(job.columns, kTileColumns);
  const Parts rows(job.rows, down), columns(job.columns, across);
  for (Index j = 0; j < across; ++j) {
    const Range c = columns[j];
    for (Index i = 0; i < down; ++i) {
      const Range r = rows[i];
      const Index size = (r.end - r.begin - 1) * kTileColumns + c.end - c.begin - 1;
      kTiles<T>.by_size[size](job, r.begin, c.begin);
    }
  }
}

template <typename T>
void lane_sums(Index count, int tasks, T factor, const T* a, const T* b, T* out, bool accumulate) {
  const MaskVec<T> valid = first_lanes<T>(tasks);
  for (Index i = 0; i < count; i += kLanes<T>) {
    const Index left = smaller(kLanes<T>, count - i);
    Vec<T> vectors[kLanes<T>] = {};
    for (Index v = 0; v < left; ++v) {
      vectors[v] = load(a + (i + v) * kLanes<T>);
      if (b) vectors[v] *= load(b + (i + v) * kLanes<T>);
      vectors[v] = select<T>(valid, vectors[v], Vec<T>{});
    }
    Vec<T> sums = broadcast(factor) * sums_of_lanes<kLanes<T>, T>(vectors);
    if (accumulate) sums += load_up_to(out + i, left);
    store_up_to(out + i, sums, left);
  }
}

template <typename T>
void lane_loss_gradient(Loss kind, Index rows, Index columns, const T* y, const T* targets, T* gy,
                        T* losses) {
  if (kind == Loss::kCrossEntropy) {
    cross_entropy_gradient(rows, columns, y, targets, gy, losses);
  } else {
    squared_error_gradient(rows * columns, y, targets, gy, losses);
  }
}

template <typename T>
void lane_loss_tangent(Loss kind, Index rows, Index columns, const T* y, const T* dy, T* dgy) {
  if (kind == Loss::kMeanSquaredError) {
    const Vec<T> scale = broadcast(2 / static_cast<T>(rows * columns));
    for (Index j = 0; j < rows * columns * kLanes<T>; j += kLanes<T>) {
      store(dgy + j, scale * load(dy + j));
    }
    return;
  }
  const Vec<T> scale = broadcast(1 / static_cast<T>(rows));
  for (Index i = 0; i < rows; ++i) {  // p * (dy - <p, dy>) / rows
    const Index at = i * columns * kLanes<T>, end = at + columns * kLanes<T>;
    softmax(columns, y + at, dgy + at);
    Vec<T> mean = {};
    for (Index j = at; j < end; j += kLanes<T>) mean = fma(load(dgy + j), load(dy + j), mean);
    for (Index j = at; j < end; j += kLanes<T>) {
      store(dgy + j, scale * load(dgy + j) * (load(dy + j) - mean));
    }
  }
}

#define FASTMAML_INSTANTIATE(T)                                                        \
  template void lane_products<T>(const LaneProducts<T>&);                              \
  template void lane_sums<T>(Index, int, T, const T*, const T*, T*, bool);             \
  template void lane_loss_gradient<T>(Loss, Index, Index, const T*, const T*, T*, T*); \
  template void lane_loss_tangent<T>(Loss, Index, Index, const T*, const T*, T*);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
