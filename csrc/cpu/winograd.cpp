#include "winograd.h"

#include "gemm_tail.h"
#include "scratch.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

constexpr int kIn = 4, kOut = 2, kTap = 3;  // sides of a tile of inputs, of outputs, and the kernel
constexpr int kPlaces = kIn * kIn;
constexpr Index kLeastTiles = 32;          // fewer do not pay for transforming the weights
constexpr Index kLeastChannels = 8;        // nor for transforming the tiles
constexpr Index kBlockBytes = 192 * 1024;  // transformed tiles that stay in the L2 cache
constexpr Index kLeastBlock = 16;
constexpr Index kWeightBytes = 96 * 1024;  // transformed weights that stay there with them

// The five transforms along one axis.
struct InputTransform {  // B'
  template <typename V>
  FASTMAML_INLINE void operator()(const V* d, V* out) const {
    out[0] = d[0] - d[2];
    out[1] = d[1] + d[2];
    out[2] = d[2] - d[1];
    out[3] = d[1] - d[3];
  }
};
struct OutputTransform {  // A'
  template <typename V>
  FASTMAML_INLINE void operator()(const V* m, V* out) const {
    out[0] = m[0] + m[1] + m[2];
    out[1] = m[1] - m[2] - m[3];
  }
};
struct OutputAdjoint {  // A
  template <typename V>
  FASTMAML_INLINE void operator()(const V* g, V* out) const {
    out[0] = g[0];
    out[1] = g[0] + g[1];
    out[2] = g[0] - g[1];
    out[3] = -g[1];
  }
};
template <typename T>
struct WeightTransform {  // G
  template <typename V>
  FASTMAML_INLINE void operator()(const V* w, V* out) const {
    const V half = broadcast(T(0.5)), ends = half * (w[0] + w[2]), middle = half * w[1];
    out[0] = w[0];
    out[1] = ends + middle;
    out[2] = ends - middle;
    out[3] = w[2];
  }
};
template <typename T>
struct WeightAdjoint {  // G'
  template <typename V>
  FASTMAML_INLINE void operator()(const V* u, V* out) const {
    const V half = broadcast(T(0.5)), sum = half * (u[1] + u[2]);
    out[0] = u[0] + sum;
    out[1] = half * (u[1] - u[2]);
    out[2] = sum + u[3];
  }
};

// `transform` along both axes: N x N values to M x M.
template <int N, int M, typename V, typename Transform>
FASTMAML_INLINE void both_axes(const V (&in)[N * N], V (&out)[M * M], Transform transform) {
  V half[M * N];
#pragma GCC unroll 4
  for (int j = 0; j < N; ++j) {
    V column[N], result[M];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) column[i] = in[i * N + j];
    transform(column, result);
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) half[i * N + j] = result[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i) transform(half + i * N, out + i * M);
}

// Rows of pixels and the tiles laid over them. Pixels outside are zero.
template <typename T, int N>
struct Field {
  const T* pixels;
  Index ld;
  int height, width;  // of an image
  int pad_h, pad_w;   // of the first tile beyond the image
  const T* zeros;     // a row of them

  FASTMAML_INLINE void tile(Index image, int tile_h, int tile_w, const T* (&at)[N * N]) const {
    const T* start = pixels + image * height * width * ld;
    const int top = kOut * tile_h - pad_h, left = kOut * tile_w - pad_w;
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) {
        const int h = top + i, w = left + j;
        const bool inside = h >= 0 && h < height && w >= 0 && w < width;
        at[i * N + j] = inside ? start + (Index{h} * width + w) * ld : zeros;
      }
    }
  }
};

struct Grid {
  int down, across;
  Grid(int out_height, int out_width)
      : down((out_height + kOut - 1) / kOut), across((out_width + kOut - 1) / kOut) {}
  Index per_image() const { return Index{down} * across; }

  // body(tile's number in the range, image, row of tiles, column of tiles)
  template <typename Body>
  FASTMAML_INLINE void for_tiles(Range range, Body body) const {
    Index image = range.begin / per_image();
    int h = static_cast<int>(range.begin % per_image() / across);
    int w = static_cast<int>(range.begin % across);
    for (Index i = 0; i < range.end - range.begin; ++i) {
      body(i, image, h, w);
      if (++w < across) continue;
      w = 0;
      if (++h < down) continue;
      h = 0;
      ++image;
    }
  }
};

// Transformed tiles: a matrix [tiles][channels] for each of the sixteen places.
template <typename T>
struct Tiles {
  T* data;
  Index capacity, ld;
  T* place(int p) const { return data + p * capacity * ld; }
};

// Channels [column, column + to.ld) of the tiles in `range`.
template <typename T, int N, typename Transform>
void transform_tiles(const Field<T, N>& field, const Grid& grid, Range range, Index column,
                     const Tiles<T>& to, Transform transform) {
  grid.for_tiles(range, [&](Index i, Index image, int h, int w) {
    const T* at[N * N];
    field.tile(image, h, w, at);
    for (Index c = 0; c < to.ld; c += kLanes<T>) {
      Vec<T> in[N * N], out[kPlaces];
#pragma GCC unroll 16
      for (int p = 0; p < N * N; ++p) in[p] = load(at[p] + column + c);
      both_axes<N, kIn>(in, out, transform);
#pragma GCC unroll 16
      for (int p = 0; p < kPlaces; ++p) store(to.place(p) + i * to.ld + c, out[p]);
    }
  });
}

// Weights [taps][k][columns], `width` of the columns, to [places][k][width].
template <typename T>
void transform_weights(const LineSweep<T>& sweep, const T* weights, Index width, T* out) {
  const Index tap_size = sweep.k * sweep.columns, place_size = sweep.k * width;
  for (Index row = 0; row < sweep.k; ++row) {
    for (Index c = 0; c < width; c += kLanes<T>) {
      Vec<T> w[kTap * kTap], u[kPlaces];
#pragma GCC unroll 9
      for (int tap = 0; tap < kTap * kTap; ++tap) {
        const int stored = sweep.flipped ? kTap * kTap - 1 - tap : tap;
        w[tap] = load(weights + stored * tap_size + row * sweep.columns + c);
      }
      both_axes<kTap, kIn>(w, u, WeightTransform<T>());
#pragma GCC unroll 16
      for (int p = 0; p < kPlaces; ++p) store(out + p * place_size + row * width + c, u[p]);
    }
  }
}

template <typename T>
void put_outputs(const LineSweep<T>& sweep, const Grid& grid, Range range, Index column,
                 const Tiles<T>& from) {
  const Index ld = sweep.columns;
  grid.for_tiles(range, [&](Index i, Index image, int h, int w) {
    const int rows = sweep.out_height - kOut * h < kOut ? 1 : kOut;
    const int across = sweep.out_width - kOut * w < kOut ? 1 : kOut;
    T* corner = sweep.out + column +
                ((image * sweep.out_height + kOut * h) * sweep.out_width + kOut * w) * ld;
    for (Index c = 0; c < from.ld; c += kLanes<T>) {
      Vec<T> m[kPlaces], y[kOut * kOut];
#pragma GCC unroll 16
      for (int p = 0; p < kPlaces; ++p) m[p] = load(from.place(p) + i * from.ld + c);
      both_axes<kIn, kOut>(m, y, OutputTransform());
      for (int a = 0; a < rows; ++a) {
        for (int b = 0; b < across; ++b) {
          T* out = corner + (Index{a} * sweep.out_width + b) * ld + c;
          Vec<T> value = y[a * kOut + b];
          if (sweep.bias) value += load(sweep.bias + column + c);
          if (sweep.accumulate) value += load(out);
          store(out, value);
        }
      }
    }
  });
}

// Tiles that are transformed, multiplied and transformed back before the next ones.
template <typename T>
Index tiles_at_once(Index channels_in, Index columns, Index tiles) {
  const Index bytes = kPlaces * (channels_in + columns) * static_cast<Index>(sizeof(T));
  return smaller(larger(kBlockBytes / bytes, kLeastBlock), tiles);
}

// Vectors of columns, at most, that are multiplied with the same transformed tiles: a panel, or
// more while their transformed weights stay small.
Index vectors_at_once(Index k, Index vectors) {
  const Index fitting = kWeightBytes / (kPlaces * k * FASTMAML_VECTOR_BYTES);
  return smaller(larger(fitting, kPanel), vectors);
}

// Hands out one thread's scratch memory piece by piece.
template <typename T>
class Pieces {
 public:
  explicit Pieces(Index count)
      : next_(static_cast<T*>(thread_scratch(static_cast<std::size_t>(count) * sizeof(T)))) {}
  T* take(Index count) {
    T* piece = next_;
    next_ += count;
    return piece;
  }
  T* take_zeros(Index count) {
    T* piece = take(count);
    for (Index i = 0; i < count; ++i) piece[i] = 0;
    return piece;
  }

 private:
  T* next_;
};

}  // namespace

template <typename T>
bool winograd_serves(const ConvGeometry& g, Index images, Index k, Index ld) {
  const bool plain = g.kernel_h == kTap && g.kernel_w == kTap && g.stride_h == 1 &&
                     g.stride_w == 1 && g.dilation_h == 1 && g.dilation_w == 1 && g.pad_h < kTap &&
                     g.pad_w < kTap;
  return plain && k >= kLeastChannels && ld == padded_to_lanes<T>(k) &&
         images * Grid(g.out_height, g.out_width).per_image() >= kLeastTiles;
}

template <typename T>
void winograd_sweep(const LineSweep<T>& sweep, Share share) {
  const Grid grid(sweep.out_height, sweep.out_width);
  const Range mine = split(sweep.images * grid.per_image(), share);
  const Index ld = sweep.terms[0].lda, vectors = sweep.vectors;
  const Index at_once = vectors_at_once(sweep.k, vectors), widest = at_once * kLanes<T>;
  const Index block = tiles_at_once<T>(ld, widest, mine.end - mine.begin);
  if (block == 0) return;
  Pieces<T> scratch(ld + kPlaces * (2 * sweep.k * widest + 2 * block * ld + block * widest));
  const T* zeros = scratch.take_zeros(ld);
  T* weights[2] = {scratch.take(kPlaces * sweep.k * widest),
                   scratch.take(kPlaces * sweep.k * widest)};
  const Tiles<T> inputs[2] = {{scratch.take(kPlaces * block * ld), block, ld},
                              {scratch.take(kPlaces * block * ld), block, ld}};
  T* products = scratch.take(kPlaces * block * widest);

  const Segment all = {0, 0, sweep.k};
  const Index groups = divide_up(vectors, at_once);
  const Parts group(vectors, groups);
  for (Index p = 0; p < groups; ++p) {
    const Index column = group[p].begin * kLanes<T>;
    const Index width = group[p].end * kLanes<T> - column;
    const Tiles<T> outputs = {products, block, width};
    for (int t = 0; t < sweep.term_count; ++t) {
      transform_weights(sweep, sweep.terms[t].b + column, width, weights[t]);
    }
    for (Index first = mine.begin; first < mine.end; first += block) {
      const Range tiles = {first, smaller(first + block, mine.end)};
      for (int t = 0; t < sweep.term_count; ++t) {
        const Field<T, kIn> field = {
            sweep.terms[t].a, ld, sweep.in_height, sweep.in_width, sweep.pad_h, sweep.pad_w, zeros};
        transform_tiles(field, grid, tiles, 0, inputs[t], InputTransform());
      }
      for (int place = 0; place < kPlaces; ++place) {
        const Index at = place * sweep.k * width;
        const RowProduct<T> product = {{{inputs[0].place(place), ld, weights[0] + at},
                                        {inputs[1].place(place), ld, weights[1] + at}},
                                       sweep.term_count,
                                       &all,
                                       1,
                                       nullptr,
                                       outputs.place(place),
                                       width,
                                       false};
        multiply_rows(product, nullptr, nullptr, 0, tiles.end - tiles.begin,
                      {0, width / kLanes<T>});
      }
      put_outputs(sweep, grid, tiles, column, outputs);
    }
  }
}

template <typename T>
void winograd_weight_grad(const ConvPlan& plan, const ProductTerm<T> (&terms)[2], int term_count,
                          T* gw, bool accumulate, Share share) {
  const ConvGeometry& g = plan.geometry;
  const Grid grid(g.out_height, g.out_width);
  const Index ld = terms[0].lda, ldo = padded_to_lanes<T>(g.out_channels), k = g.in_channels;
  const Index vectors = ldo / kLanes<T>;
  const Index at_once = vectors_at_once(k, vectors), widest = at_once * kLanes<T>;
  const Index count = plan.images * grid.per_image();
  const Index block = tiles_at_once<T>(2 * ld, 2 * widest, count);
  Pieces<T> scratch(larger(ld, ldo) + kPlaces * (2 * block * (ld + widest) + k * widest));
  const T* zeros = scratch.take_zeros(larger(ld, ldo));
  const Tiles<T> inputs[2] = {{scratch.take(kPlaces * block * ld), block, ld},
                              {scratch.take(kPlaces * block * ld), block, ld}};
  T* spread[2] = {scratch.take(kPlaces * block * widest), scratch.take(kPlaces * block * widest)};
  T* sums = scratch.take(kPlaces * k * widest);

  const int tail = tail_columns<T>(g.out_channels, k, count);
  const Range mine = split(vectors, share);
  const Index groups = divide_up(mine.end - mine.begin, at_once);
  const Parts group(mine.end - mine.begin, groups);
  for (Index p = 0; p < groups; ++p) {
    const Index column = (mine.begin + group[p].begin) * kLanes<T>;
    const Index width = (group[p].end - group[p].begin) * kLanes<T>;
    const bool with_tail = tail > 0 && column + width == ldo;
    const Columns columns = {width / kLanes<T> - (with_tail ? 1 : 0), with_tail ? tail : 0};
    const Tiles<T> outputs[2] = {{spread[0], block, width}, {spread[1], block, width}};
    for (Index first = 0; first < count; first += block) {
      const Range tiles = {first, smaller(first + block, count)};
      for (int t = 0; t < term_count; ++t) {
        const Field<T, kIn> x = {terms[t].a, ld, g.height, g.width, g.pad_h, g.pad_w, zeros};
        const Field<T, kOut> gy = {terms[t].b, ldo, g.out_height, g.out_width, 0, 0, zeros};
        transform_tiles(x, grid, tiles, 0, inputs[t], InputTransform());
        transform_tiles(gy, grid, tiles, column, outputs[t], OutputAdjoint());
      }
      for (int place = 0; place < kPlaces; ++place) {
        const OuterProduct<T> product = {{{inputs[0].place(place), ld, outputs[0].place(place)},
                                          {inputs[1].place(place), ld, outputs[1].place(place)}},
                                         term_count,
                                         nullptr,
                                         tiles.end - tiles.begin,
                                         sums + place * k * width,
                                         width,
                                         first > 0};
        multiply_outer(product, k, columns, {0, outer_units<T>(k, columns)});
      }
    }
    for (Index row = 0; row < k; ++row) {
      for (Index c = 0; c < width; c += kLanes<T>) {
        Vec<T> u[kPlaces], w[kTap * kTap];
#pragma GCC unroll 16
        for (int place = 0; place < kPlaces; ++place) {
          u[place] = load(sums + (place * k + row) * width + c);
        }
        both_axes<kIn, kTap>(u, w, WeightAdjoint<T>());
        for (int tap = 0; tap < kTap * kTap; ++tap) {
          T* out = gw + (tap * k + row) * ldo + column + c;
          store(out, accumulate ? load(out) + w[tap] : w[tap]);
        }
      }
    }
  }
}

#define FASTMAML_INSTANTIATE(T)                                                               \
  template bool winograd_serves<T>(const ConvGeometry&, Index, Index, Index);                 \
  template void winograd_sweep<T>(const LineSweep<T>&, Share);                                \
  template void winograd_weight_grad<T>(const ConvPlan&, const ProductTerm<T>(&)[2], int, T*, \
                                        bool, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
