#include "grouped_conv.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// A source and the weights that it is multiplied with.
template <typename T>
struct Factors {
  const T *x, *w;
};

// One line of one plane of the destination: what all of its columns have in common.
template <typename T>
struct Line {
  const GroupedSweep* sweep;
  Factors<T> factors[2];  // the first plane of the image, the weights of the destination's plane
  int count;
  const GroupedTap* taps;  // of this line
  int tap_count;
  Index ld;
  const T* bias;
};

// `kColumns` places of a run from the j-th on, one vector of groups at `lane`.
template <typename T, int kColumns>
void columns(const Line<T>& line, const GroupedRun& run, Index j, Index lane, T* y,
             bool accumulate) {
  const GroupedSweep& s = *line.sweep;
  const Index ld = line.ld, step = run.source_step * ld;
  T* out = y + (run.first + j * run.step) * ld + lane;
  Vec<T> sums[kColumns];
  const Vec<T> start = line.bias ? load(line.bias + lane) : broadcast(T(0));
  for (int i = 0; i < kColumns; ++i) {
    sums[i] = accumulate ? load(out + i * run.step * ld) + start : start;
  }
  for (int f = 0; f < line.count; ++f) {
    for (Index plane = 0; plane < s.in_planes; ++plane) {
      const T* x = line.factors[f].x + plane * s.in_height * s.in_width * ld + lane;
      const T* w = line.factors[f].w + plane * s.weight_in * ld + lane;
      for (int a = 0; a < line.tap_count; ++a) {
        const T* row = x + line.taps[a].source * s.in_width * ld;
        const T* weights = w + line.taps[a].tap * s.kernel_w * s.weight_tap * ld;
        for (int b = 0; b < run.tap_count; ++b) {
          const GroupedTap tap = s.columns.taps[run.first_tap + b];
          const Vec<T> weight = load(weights + tap.tap * s.weight_tap * ld);
          const T* from = row + tap.source * ld + j * step;
          for (int i = 0; i < kColumns; ++i) sums[i] = fma(load(from + i * step), weight, sums[i]);
        }
      }
    }
  }
  for (int i = 0; i < kColumns; ++i) store(out + i * run.step * ld, sums[i]);
}

template <typename T>
void run_of_columns(const Line<T>& line, const GroupedRun& run, Index lane, T* y, bool accumulate) {
  Index j = 0;
  for (; j + 8 <= run.count; j += 8) columns<T, 8>(line, run, j, lane, y, accumulate);
  if (j + 4 <= run.count) {
    columns<T, 4>(line, run, j, lane, y, accumulate);
    j += 4;
  }
  for (; j < run.count; ++j) columns<T, 1>(line, run, j, lane, y, accumulate);
}

// gw of `kTaps` taps += x gy, along a run of one line.
template <typename T, int kTaps>
void run_of_products(const GroupedTap* taps, const T* x, Index x_step, const T* gy, Index gy_step,
                     Index count, Index ld, T* gw, Index tap_step) {
  Vec<T> sums[kTaps];
  for (int t = 0; t < kTaps; ++t) sums[t] = load(gw + taps[t].tap * tap_step);
  for (Index j = 0; j < count; ++j) {
    const Vec<T> gradient = load(gy + j * gy_step);
    for (int t = 0; t < kTaps; ++t) {
      sums[t] = fma(load(x + taps[t].source * ld + j * x_step), gradient, sums[t]);
    }
  }
  for (int t = 0; t < kTaps; ++t) store(gw + taps[t].tap * tap_step, sums[t]);
}

// One line of the output's gradient with one plane of the input, one vector of groups.
template <typename T>
void line_of_products(const GroupedSweep& s, const GroupedRun& line, const T* x, const T* gy,
                      Index ld, T* gw) {
  const Index tap_step = s.weight_tap * ld;
  for (int a = 0; a < line.tap_count; ++a) {
    const GroupedTap above = s.lines.taps[line.first_tap + a];
    const T* row = x + above.source * s.in_width * ld;
    T* weights = gw + above.tap * s.kernel_w * tap_step;
    for (int r = 0; r < s.columns.run_count; ++r) {
      const GroupedRun& run = s.columns.runs[r];
      const GroupedTap* taps = s.columns.taps + run.first_tap;
      const T* from = gy + run.first * ld;
      const Index x_step = run.source_step * ld, gy_step = run.step * ld;
      int t = 0;
      for (; t + 3 <= run.tap_count; t += 3) {
        run_of_products<T, 3>(taps + t, row, x_step, from, gy_step, run.count, ld, weights,
                              tap_step);
      }
      for (; t < run.tap_count; ++t) {
        run_of_products<T, 1>(taps + t, row, x_step, from, gy_step, run.count, ld, weights,
                              tap_step);
      }
    }
  }
}

}  // namespace

template <typename T>
void grouped_conv_sweep(const GroupedSweep& s, Index images, const T* x, const T* w, const T* x2,
                        const T* w2, const T* bias, T* y, bool accumulate, Share share) {
  const Index ld = padded_to_lanes<T>(s.groups), line_size = s.out_width * ld;
  const Index image_size = s.in_planes * s.in_height * s.in_width * ld;
  const Range mine = split(images * s.out_planes * s.out_height, share);
  for (Index i = mine.begin; i < mine.end; ++i) {
    const Index place = i % s.out_height, plane = i / s.out_height % s.out_planes;
    const Index image = i / s.out_height / s.out_planes;
    const Index source = image * image_size, weights = plane * s.weight_out * ld;
    const GroupedRun& taps = s.lines.runs[place];
    const Line<T> line = {
        &s,
        {{x + source, w + weights}, {x2 + (x2 ? source : 0), w2 + (w2 ? weights : 0)}},
        x2 ? 2 : 1,
        s.lines.taps + taps.first_tap,
        taps.tap_count,
        ld,
        bias ? bias + plane * ld : nullptr};
    for (Index lane = 0; lane < ld; lane += kLanes<T>) {
      for (int r = 0; r < s.columns.run_count; ++r) {
        run_of_columns(line, s.columns.runs[r], lane, y + i * line_size, accumulate);
      }
    }
  }
}

template <typename T>
void grouped_conv_weight_grad(const GroupedSweep& s, Index images, const T* x, const T* gy,
                              const T* x2, const T* gy2, T* gw, bool accumulate, Share share) {
  const Index ld = padded_to_lanes<T>(s.groups), vectors = ld / kLanes<T>;
  const Index in_size = s.in_height * s.in_width * ld, out_size = s.out_height * s.out_width * ld;
  const Range mine = split(s.out_planes * s.in_planes * vectors, share);
  if (!accumulate) {
    for (Index unit = mine.begin; unit < mine.end; ++unit) {
      for (Index tap = 0; tap < s.kernel_h * s.kernel_w; ++tap) {
        const Index row = tap * s.weight_tap + unit / vectors;
        store(gw + row * ld + unit % vectors * kLanes<T>, broadcast(T(0)));
      }
    }
  }
  for (int f = 0; f < (x2 ? 2 : 1); ++f) {
    const T *from = f == 0 ? x : x2, *gradient = f == 0 ? gy : gy2;
    for (Index i = 0; i < images * s.out_height; ++i) {
      const Index image = i / s.out_height, place = i % s.out_height;
      for (Index unit = mine.begin; unit < mine.end; ++unit) {
        const Index row = unit / vectors, lane = unit % vectors * kLanes<T>;
        const Index in = image * s.in_planes + row % s.in_planes;
        const Index out = image * s.out_planes + row / s.in_planes;
        line_of_products(s, s.lines.runs[place], from + in * in_size + lane,
                         gradient + out * out_size + place * s.out_width * ld + lane, ld,
                         gw + row * ld + lane);
      }
    }
  }
}

#define FASTMAML_INSTANTIATE(T)                                                                 \
  template void grouped_conv_sweep<T>(const GroupedSweep&, Index, const T*, const T*, const T*, \
                                      const T*, const T*, T*, bool, Share);                     \
  template void grouped_conv_weight_grad<T>(const GroupedSweep&, Index, const T*, const T*,     \
                                            const T*, const T*, T*, bool, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
