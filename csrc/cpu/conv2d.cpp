#include "conv2d.h"

#include "gemm.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

constexpr int kMaxSegments = 64;
constexpr Index kUnfoldElements = 4096;  // of the buffer that narrow inputs are unfolded into
constexpr int kNarrow = 4;               // input channels too few to fill a register tile

// Sources, destinations and weights of one direction.
template <typename T>
struct SweepData {
  ProductTerm<T> terms[2];
  int term_count;
  Index k;        // channels of a source row
  Index columns;  // channels of a destination row, padded
  const T* bias;
  T* out;
  bool accumulate;
};

// The taps of a pass as runs of products; taps that follow each other both in memory and in the
// weights become one run.
template <typename T>
int make_segments(const ConvPass& pass, const SweepData<T>& data, Segment* segments) {
  int count = 0;
  for (int t = 0; t < pass.tap_count; ++t) {
    const Index a_offset = pass.shifts[t] * data.terms[0].lda, b_offset = pass.taps[t] * data.k;
    if (count > 0) {
      Segment& last = segments[count - 1];
      if (last.a_offset + last.k == a_offset && last.b_offset + last.k == b_offset) {
        last.k += data.k;
        continue;
      }
    }
    segments[count++] = {a_offset, b_offset, data.k};
  }
  return count;
}

// First entry of a pass whose destination is at least `row`.
Index lower_bound(const ConvPass& pass, Index row) {
  Index low = 0, high = pass.rows;
  while (low < high) {
    const Index middle = (low + high) / 2;
    if (pass.destination[middle] < row) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

template <typename T>
void run_pass(const ConvPass& pass, const SweepData<T>& data, Range rows, Index source_start,
              Index destination_start) {
  const Index first = pass.destination[0] >= rows.begin ? 0 : lower_bound(pass, rows.begin);
  const Index last =
      pass.destination[pass.rows - 1] < rows.end ? pass.rows : lower_bound(pass, rows.end);
  if (first >= last) return;
  Segment segments[kMaxSegments];
  RowProduct<T> product = {{data.terms[0], data.terms[1]},
                           data.term_count,
                           segments,
                           make_segments(pass, data, segments),
                           pass.accumulate ? nullptr : data.bias,
                           data.out + destination_start * data.columns,
                           data.columns,
                           pass.accumulate || data.accumulate};
  for (int t = 0; t < data.term_count; ++t) {
    product.terms[t].a += source_start * product.terms[t].lda;
  }
  multiply_rows(product, pass.source, pass.destination, first, last - first,
                {0, data.columns / kLanes<T>});
}

template <typename T>
void run_sweep(const ConvSweep& sweep, Index images, const SweepData<T>& data, Share share) {
  const Range mine = split(images * sweep.destination_rows, share);
  for (Index row = mine.begin; row < mine.end;) {
    const Index image = row / sweep.destination_rows;
    const Index start = image * sweep.destination_rows;
    Range block = {row - start, smaller(mine.end - start, row - start + sweep.block_rows)};
    block.end = smaller(block.end, sweep.images * sweep.destination_rows);
    for (int p = 0; p < sweep.pass_count; ++p) {
      run_pass(sweep.passes[p], data, block, image * sweep.source_rows, start);
    }
    row = start + block.end;
  }
}

template <typename T>
void weight_grad_by_tap(const ConvPlan& plan, const ProductTerm<T> (&terms)[2], int term_count,
                        T* gw, bool accumulate, Share share) {
  const ConvGeometry& g = plan.geometry;
  const ConvWeightWalk& walk = plan.weight_grad;
  const Index ld = padded_to_lanes<T>(g.out_channels), vectors = ld / kLanes<T>;
  const Index per_tap = outer_units(g.in_channels, vectors);
  const Range mine = split(per_tap * g.kernel_h * g.kernel_w, share);
  for (Index scope = 0; scope < walk.scopes; ++scope) {
    for (Index begin = 0; begin < walk.units; begin += walk.block_units) {
      const bool add = accumulate || scope > 0 || begin > 0;
      for (Index unit = mine.begin; unit < mine.end;) {
        const Index tap = unit / per_tap;
        const Range units = {unit - tap * per_tap, smaller(mine.end - tap * per_tap, per_tap)};
        unit = tap * per_tap + units.end;
        const ConvTapPairs& pairs = walk.taps[tap];
        const Index first = larger(begin, pairs.first_unit);
        const Index last = smaller(smaller(begin + walk.block_units, walk.units), pairs.last_unit);
        if (first >= last && add) continue;
        const Index input = scope * walk.scope_input + first * walk.unit_input + pairs.input_start;
        const Index output = scope * walk.scope_output + first * walk.unit_output;
        OuterProduct<T> product = {{terms[0], terms[1]},
                                   term_count,
                                   pairs.pairs,
                                   larger(last - first, 0) * pairs.per_unit,
                                   gw + tap * g.in_channels * ld,
                                   ld,
                                   add};
        for (int t = 0; t < term_count; ++t) {
          product.terms[t].a += input * terms[t].lda;
          product.terms[t].b += output * ld;
        }
        multiply_outer(product, g.in_channels, vectors, units);
      }
    }
  }
}

// Writes whole vectors, so up to a vector past `count`: the next run overwrites that.
template <typename T>
FASTMAML_INLINE T* append(T* out, const T* in, Index count) {
  Index i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(out + i, load(in + i));
  if (i < count) store(out + i, load_first(in + i, static_cast<int>(count - i)));
  return out + count;
}
template <typename T>
FASTMAML_INLINE T* append_zeros(T* out, Index count) {
  for (Index i = 0; i < count; i += kLanes<T>) store(out + i, Vec<T>{});
  return out + count;
}

// The taps of one kernel line that fall on input line `line`, or zeros in the padding.
template <typename T>
FASTMAML_INLINE T* unfold_line(const ConvGeometry& g, const T* line, Index ldx, int first, T* out) {
  const Index channels = g.in_channels;
  if (!line) return append_zeros(out, g.kernel_w * channels);
  if (g.dilation_w == 1 && ldx == channels) {
    const Index before = smaller(larger(-first, 0), g.kernel_w);
    const Index end = larger(smaller(g.width - first, g.kernel_w), before);
    out = append_zeros(out, before * channels);
    out = append(out, line + (first + before) * ldx, (end - before) * channels);
    return append_zeros(out, (g.kernel_w - end) * channels);
  }
  for (int tap = 0; tap < g.kernel_w; ++tap) {
    const int column = first + tap * g.dilation_w;
    const bool inside = column >= 0 && column < g.width;
    out = inside ? append(out, line + column * ldx, channels) : append_zeros(out, channels);
  }
  return out;
}

// Rows of kernel_h * kernel_w * in_channels values, one for each output position of `rows`.
template <typename T>
void unfold(const ConvGeometry& g, const T* image, Index ldx, Range rows, T* out) {
  for (Index row = rows.begin; row < rows.end; ++row) {
    const int top = static_cast<int>(row / g.out_width) * g.stride_h - g.pad_h;
    const int left = static_cast<int>(row % g.out_width) * g.stride_w - g.pad_w;
    for (int tap = 0; tap < g.kernel_h; ++tap) {
      const int line = top + tap * g.dilation_h;
      const bool inside = line >= 0 && line < g.height;
      out = unfold_line(g, inside ? image + line * g.width * ldx : nullptr, ldx, left, out);
    }
  }
}

template <typename T>
void weight_grad_unfolded(const ConvPlan& plan, const ProductTerm<T> (&terms)[2], int term_count,
                          T* gw, bool accumulate, Share share) {
  const ConvGeometry& g = plan.geometry;
  const Index inputs = g.height * g.width, outputs = g.out_height * g.out_width;
  const Index k = g.kernel_h * g.kernel_w * g.in_channels;
  const Index ld = padded_to_lanes<T>(g.out_channels), vectors = ld / kLanes<T>;
  const Range mine = split(outer_units(k, vectors), share);
  if (mine.begin == mine.end) return;
  alignas(64) T buffer[kUnfoldElements + kLanes<T>];
  const Index block = kUnfoldElements / k;
  for (int t = 0; t < term_count; ++t) {
    for (Index image = 0; image < plan.images; ++image) {
      for (Index row = 0; row < outputs; row += block) {
        const Range rows = {row, smaller(row + block, outputs)};
        unfold(g, terms[t].a + image * inputs * terms[t].lda, terms[t].lda, rows, buffer);
        const OuterProduct<T> product = {
            {{buffer, k, terms[t].b + (image * outputs + row) * ld}, {}},
            1,
            nullptr,
            rows.end - rows.begin,
            gw,
            ld,
            accumulate || t > 0 || image > 0 || row > 0};
        multiply_outer(product, k, vectors, mine);
      }
    }
  }
}

}  // namespace

template <typename T>
ConvPlan* conv_plan(const ConvGeometry& geometry, Index images) {
  return make_conv_plan(geometry, images,
                        {kLanes<T>, kPanel, kPanelRows, static_cast<int>(sizeof(T))});
}

template <typename T>
void conv_forward(const ConvPlan& plan, const T* x, Index ldx, const T* w, const T* x2, const T* w2,
                  const T* bias, T* y, Share share) {
  const ConvGeometry& g = plan.geometry;
  const SweepData<T> data = {{{x, ldx, w}, {x2, ldx, w2}},
                             x2 ? 2 : 1,
                             g.in_channels,
                             padded_to_lanes<T>(g.out_channels),
                             bias,
                             y,
                             false};
  run_sweep(plan.forward, plan.images, data, share);
}

template <typename T>
void conv_input_grad(const ConvPlan& plan, const T* gy, const T* wt, const T* gy2, const T* wt2,
                     T* gx, bool accumulate, Share share) {
  const ConvGeometry& g = plan.geometry;
  const Index ld = padded_to_lanes<T>(g.out_channels);
  const SweepData<T> data = {{{gy, ld, wt}, {gy2, ld, wt2}},
                             gy2 ? 2 : 1,
                             g.out_channels,
                             padded_to_lanes<T>(g.in_channels),
                             nullptr,
                             gx,
                             accumulate};
  run_sweep(plan.input_grad, plan.images, data, share);
}

template <typename T>
void conv_weight_grad(const ConvPlan& plan, const T* x, Index ldx, const T* gy, const T* x2,
                      const T* gy2, T* gw, bool accumulate, Share share) {
  const ConvGeometry& g = plan.geometry;
  const ProductTerm<T> terms[2] = {{x, ldx, gy}, {x2, ldx, gy2}};
  const int term_count = x2 ? 2 : 1;
  const bool unfolds =
      g.in_channels <= kNarrow && g.in_channels * g.kernel_h * g.kernel_w <= kUnfoldElements;
  if (unfolds) {
    weight_grad_unfolded(plan, terms, term_count, gw, accumulate, share);
  } else {
    weight_grad_by_tap(plan, terms, term_count, gw, accumulate, share);
  }
}

#define FASTMAML_INSTANTIATE(T)                                                                 \
  template ConvPlan* conv_plan<T>(const ConvGeometry&, Index);                                  \
  template void conv_forward<T>(const ConvPlan&, const T*, Index, const T*, const T*, const T*, \
                                const T*, T*, Share);                                           \
  template void conv_input_grad<T>(const ConvPlan&, const T*, const T*, const T*, const T*, T*, \
                                   bool, Share);                                                \
  template void conv_weight_grad<T>(const ConvPlan&, const T*, Index, const T*, const T*,       \
                                    const T*, T*, bool, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
