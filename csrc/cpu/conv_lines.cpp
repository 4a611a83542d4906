#include "conv_lines.h"

#include <utility>

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

constexpr int kTaps = 3;       // width of the kernels served
constexpr int kLinePanel = 2;  // vectors of output channels a tile spans, at most
// With 32 registers, tiles of 3 taps and two vectors leave room for 12 positions; with 16 there is
// no room for a tile worth having.
constexpr int kPositions[] = {0, 16, 12};
constexpr int kInputs[] = {0, 8, 4};     // input channels of a weight gradient's tile
constexpr int kLeastWidth = 5;           // narrower tiles wait for their own results
constexpr Index kLineBytes = 20 * 1024;  // of output gradient that stay in L1 between tiles

template <typename T>
struct LineTile {
  const LineSweep<T>* sweep;
  const T* lines[2];    // first input line a tap of this tile meets, one for each term
  int first_tap, taps;  // lines of the kernel inside the image
  Index in_line;        // elements from one of those input lines to the next
  Index ldx;
  int skip_left, skip_right;  // positions outside the image
  Index column;
};

template <typename T, int R, int NV>
__attribute__((noinline)) void line_tile(const LineTile<T>& tile, int first, T* out) {
  const LineSweep<T>& sweep = *tile.sweep;
  const Index ld = sweep.columns, k = sweep.k, ldx = tile.ldx;
  const Index tap_step = sweep.flipped ? -k * ld : k * ld;
  const int end = R + kTaps - 1 - tile.skip_right;
  Vec<T> sum[R][NV] = {};
  for (int t = 0; t < sweep.term_count; ++t) {
    for (int tap = 0; tap < tile.taps; ++tap) {
      const int tap_h = tile.first_tap + tap;
      const T* x = tile.lines[t] + tap * tile.in_line + (first - sweep.pad_w) * ldx;
      const Index start = sweep.flipped ? (sweep.kernel_h - tap_h) * kTaps - 1 : tap_h * kTaps;
      const T* w = sweep.terms[t].b + start * k * ld + tile.column;
      for (Index c = 0; c < k; ++c, ++x, w += ld) {
        Vec<T> weights[kTaps][NV];
#pragma GCC unroll 3
        for (int tap_w = 0; tap_w < kTaps; ++tap_w) {
#pragma GCC unroll 2
          for (int j = 0; j < NV; ++j) {
            weights[tap_w][j] = load(w + tap_w * tap_step + j * kLanes<T>);
          }
        }
#pragma GCC unroll 20
        for (int i = 0; i < R + kTaps - 1; ++i) {
          if (i < kTaps - 1 && i < tile.skip_left) continue;
          if (i >= R && i >= end) continue;
          const Vec<T> value = broadcast(x[i * ldx]);
#pragma GCC unroll 3
          for (int tap_w = 0; tap_w < kTaps; ++tap_w) {
            const int r = i - tap_w;
            if (r < 0 || r >= R) continue;
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j) sum[r][j] = fma(value, weights[tap_w][j], sum[r][j]);
          }
        }
      }
    }
  }
  const bool accumulate = sweep.accumulate;
  Vec<T> bias[NV] = {};
#pragma GCC unroll 2
  for (int j = 0; j < NV; ++j) {
    if (sweep.bias) bias[j] = load(sweep.bias + tile.column + j * kLanes<T>);
  }
  T* y = out + first * ld + tile.column;
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r, y += ld) {
#pragma GCC unroll 2
    for (int j = 0; j < NV; ++j) {
      Vec<T> value = sum[r][j] + bias[j];
      if (accumulate) value += load(y + j * kLanes<T>);
      store(y + j * kLanes<T>, value);
    }
  }
}

template <typename T, int NV, int... R>
void run_line_tile(const LineTile<T>& tile, Range positions, T* out,
                   std::integer_sequence<int, R...>) {
  using Run = void (*)(const LineTile<T>&, int, T*);
  static constexpr Run kTiles[] = {&line_tile<T, R + 1, NV>...};
  kTiles[positions.end - positions.begin - 1](tile, static_cast<int>(positions.begin), out);
}

// One output line, one panel of its channels.
template <typename T, int NV>
void sweep_line(LineTile<T>* tile, T* out) {
  const LineSweep<T>& sweep = *tile->sweep;
  const int tiles = static_cast<int>(divide_up(sweep.out_width, kPositions[NV]));
  for (int i = 0; i < tiles; ++i) {
    const Range positions = split(sweep.out_width, {i, tiles});
    tile->skip_left = static_cast<int>(larger(sweep.pad_w - positions.begin, 0));
    tile->skip_right =
        static_cast<int>(larger(positions.end + kTaps - 1 - sweep.pad_w - sweep.in_width, 0));
    run_line_tile<T, NV>(*tile, positions, out, std::make_integer_sequence<int, kPositions[NV]>());
  }
}

template <typename T>
struct GradTile {
  const ConvGeometry* geometry;
  const ProductTerm<T>* terms;  // a: input, b: output gradient, both from the image's start
  int term_count;
  Range lines;  // of the output
  Index ld;
  T* gw;
  bool accumulate;
};

// Kernel line `tap_h`, input channels from `channel`, output channels from `column`.
template <typename T, int R, int NV>
__attribute__((noinline)) void grad_tile(const GradTile<T>& tile, int tap_h, Index channel,
                                         Index column) {
  const ConvGeometry& g = *tile.geometry;
  const Index ld = tile.ld;
  Vec<T> sum[kTaps][R][NV] = {};
  for (int t = 0; t < tile.term_count; ++t) {
    const Index ldx = tile.terms[t].lda;
    for (Index line = tile.lines.begin; line < tile.lines.end; ++line) {
      const Index in_line = line + tap_h * g.dilation_h - g.pad_h;
      if (in_line < 0 || in_line >= g.height) continue;
      const T* x = tile.terms[t].a + in_line * g.width * ldx + channel;
      const T* gy = tile.terms[t].b + line * g.out_width * ld + column;
      // window[tap] is the gradient of the output that this tap of the current input feeds.
      Vec<T> window[kTaps][NV] = {};
      const auto advance = [&](Index out, bool inside) __attribute__((always_inline)) {
#pragma GCC unroll 3
        for (int tap = kTaps - 1; tap > 0; --tap) {
#pragma GCC unroll 2
          for (int j = 0; j < NV; ++j) window[tap][j] = window[tap - 1][j];
        }
#pragma GCC unroll 2
        for (int j = 0; j < NV; ++j) {
          window[0][j] = inside ? load(gy + out * ld + j * kLanes<T>) : Vec<T>{};
        }
      };
      const auto multiply = [&](const T* values) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<T> value = broadcast(values[r]);
#pragma GCC unroll 3
          for (int tap = 0; tap < kTaps; ++tap) {
#pragma GCC unroll 2
            for (int j = 0; j < NV; ++j) {
              sum[tap][r][j] = fma(value, window[tap][j], sum[tap][r][j]);
            }
          }
        }
      };
      for (int out = 0; out < g.pad_w; ++out) advance(out, out < g.out_width);
      const Index meeting = larger(smaller(g.width, g.out_width - g.pad_w), 0);
      Index in = 0;
      for (; in < meeting; ++in) {
        advance(in + g.pad_w, true);
        multiply(x + in * ldx);
      }
      for (; in < g.width; ++in) {
        advance(0, false);
        multiply(x + in * ldx);
      }
    }
  }
#pragma GCC unroll 3
  for (int tap = 0; tap < kTaps; ++tap) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      T* gw = tile.gw + ((tap_h * kTaps + tap) * g.in_channels + channel + r) * ld + column;
#pragma GCC unroll 2
      for (int j = 0; j < NV; ++j) {
        Vec<T> value = sum[tap][r][j];
        if (tile.accumulate) value += load(gw + j * kLanes<T>);
        store(gw + j * kLanes<T>, value);
      }
    }
  }
}

template <typename T, int NV, int... R>
void run_grad_tile(const GradTile<T>& tile, int tap_h, Range channels, Index column,
                   std::integer_sequence<int, R...>) {
  using Run = void (*)(const GradTile<T>&, int, Index, Index);
  static constexpr Run kTiles[] = {&grad_tile<T, R + 1, NV>...};
  kTiles[channels.end - channels.begin - 1](tile, tap_h, channels.begin, column);
}

struct Panels {
  Index vectors, count;
  explicit Panels(Index vectors) : vectors(vectors), count(divide_up(vectors, kLinePanel)) {}
  Range operator[](Index i) const {
    return split(vectors, {static_cast<int>(i), static_cast<int>(count)});
  }
  int widest() const { return static_cast<int>(divide_up(vectors, count)); }
};

bool steps_by_one(const ConvGeometry& g) {
  return kManyRegisters && g.kernel_w == kTaps && g.stride_h == 1 && g.stride_w == 1 &&
         g.dilation_w == 1 && g.pad_w < kTaps;
}

}  // namespace

template <typename T>
bool sweeps_by_line(const ConvGeometry& g, int out_width, Index columns) {
  return steps_by_one(g) && out_width >= kLeastWidth && columns <= kLinePanel * kLanes<T>;
}

template <typename T>
void sweep_lines(const LineSweep<T>& sweep, Share share) {
  const Panels panels(sweep.vectors);
  const Range mine = split(sweep.images * sweep.out_height, share);
  for (Index line = mine.begin; line < mine.end; ++line) {
    const Index image = line / sweep.out_height;
    const int top = static_cast<int>(line % sweep.out_height) - sweep.pad_h;
    LineTile<T> tile = {};
    tile.sweep = &sweep;
    tile.ldx = sweep.terms[0].lda;
    while (tile.first_tap < sweep.kernel_h && top + tile.first_tap * sweep.dilation_h < 0) {
      ++tile.first_tap;
    }
    int end = tile.first_tap;
    while (end < sweep.kernel_h && top + end * sweep.dilation_h < sweep.in_height) ++end;
    tile.taps = end - tile.first_tap;
    const Index in_line = image * sweep.in_height + top + tile.first_tap * sweep.dilation_h;
    tile.in_line = sweep.dilation_h * sweep.in_width * tile.ldx;
    for (int t = 0; t < sweep.term_count; ++t) {
      tile.lines[t] = sweep.terms[t].a + in_line * sweep.in_width * tile.ldx;
    }
    T* out = sweep.out + line * sweep.out_width * sweep.columns;
    for (Index p = 0; p < panels.count; ++p) {
      tile.column = panels[p].begin * kLanes<T>;
      if (panels[p].end - panels[p].begin == 1) {
        sweep_line<T, 1>(&tile, out);
      } else {
        sweep_line<T, 2>(&tile, out);
      }
    }
  }
}

template <typename T>
bool weight_grad_by_line(const ConvGeometry& g) {
  return steps_by_one(g) && g.width >= kLeastWidth &&
         padded_to_lanes<T>(g.out_channels) <= kLinePanel * kLanes<T>;
}

template <typename T>
void weight_grad_lines(const ConvPlan& plan, const ProductTerm<T> (&terms)[2], int term_count,
                       T* gw, bool accumulate, Share share) {
  const ConvGeometry& g = plan.geometry;
  const Index ld = padded_to_lanes<T>(g.out_channels);
  const Panels panels(ld / kLanes<T>);
  const Index tiles = divide_up(g.in_channels, kInputs[panels.widest()]);
  const Range mine = split(g.kernel_h * tiles * panels.count, share);
  const Index line_bytes = g.out_width * ld * term_count * static_cast<Index>(sizeof(T));
  const Index blocks =
      smaller(divide_up(g.out_height * line_bytes, kLineBytes + line_bytes / 2), g.out_height);
  for (Index image = 0; image < plan.images; ++image) {
    ProductTerm<T> image_terms[2];
    for (int t = 0; t < term_count; ++t) {
      image_terms[t] = {terms[t].a + image * g.height * g.width * terms[t].lda, terms[t].lda,
                        terms[t].b + image * g.out_height * g.out_width * ld};
    }
    for (Index block = 0; block < blocks; ++block) {
      const GradTile<T> tile = {
          &g,
          image_terms,
          term_count,
          split(g.out_height, {static_cast<int>(block), static_cast<int>(blocks)}),
          ld,
          gw,
          accumulate || image > 0 || block > 0};
      for (Index unit = mine.begin; unit < mine.end; ++unit) {
        const int tap_h = static_cast<int>(unit / (tiles * panels.count));
        const Index rest = unit % (tiles * panels.count);
        const Range panel = panels[rest / tiles];
        const Range channels =
            split(g.in_channels, {static_cast<int>(rest % tiles), static_cast<int>(tiles)});
        const Index column = panel.begin * kLanes<T>;
        if (panel.end - panel.begin == 1) {
          run_grad_tile<T, 1>(tile, tap_h, channels, column,
                              std::make_integer_sequence<int, kInputs[1]>());
        } else {
          run_grad_tile<T, 2>(tile, tap_h, channels, column,
                              std::make_integer_sequence<int, kInputs[2]>());
        }
      }
    }
  }
}

#define FASTMAML_INSTANTIATE(T)                                                                  \
  template bool sweeps_by_line<T>(const ConvGeometry&, int, Index);                              \
  template void sweep_lines<T>(const LineSweep<T>&, Share);                                      \
  template bool weight_grad_by_line<T>(const ConvGeometry&);                                     \
  template void weight_grad_lines<T>(const ConvPlan&, const ProductTerm<T>(&)[2], int, T*, bool, \
                                     Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
