#include "conv2d.h"

#include "conv_lines.h"
#include "gemm_tail.h"
#include "winograd.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

constexpr int kMaxSegments = 64;
constexpr Index kPairedBytes = 36 * 1024;  // output gradients of both products that may share L1
constexpr int kNarrow = 4;                 // input channels too few to fill a register tile
constexpr Index kNarrowRows = 256;         // taps times channels of a narrow weight gradient
constexpr Index kNarrowElements = 4096;    // of the buffer its input lines are laid out in
constexpr Index kNarrowOutputs = 5120;     // elements of the output gradient per pass over it

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
  int tail;  // of those channels (see gemm_tail.h)
  Index tail_step;
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
void run_pass(const ConvPass& pass, const SweepData<T>& data, Range rows, Range vectors,
              Index source_start, Index destination_start) {
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
                           pass.accumulate || data.accumulate,
                           deep_enough(data.tail, pass.tap_count * data.k) ? data.tail : 0,
                           data.tail_step};
  for (int t = 0; t < data.term_count; ++t) {
    product.terms[t].a += source_start * product.terms[t].lda;
  }
  multiply_rows(product, pass.source, pass.destination, first, last - first, vectors);
}

// Vectors [vectors.begin, vectors.end) of the destination's channels.
template <typename T>
void run_sweep(const ConvSweep& sweep, Index images, const SweepData<T>& data, Range vectors,
               Share share) {
  const Range mine = split(images * sweep.destination_rows, share);
  for (Index row = mine.begin; row < mine.end;) {
    const Index image = row / sweep.destination_rows;
    const Index start = image * sweep.destination_rows;
    Range block = {row - start, smaller(mine.end - start, row - start + sweep.block_rows)};
    block.end = smaller(block.end, sweep.images * sweep.destination_rows);
    for (int p = 0; p < sweep.pass_count; ++p) {
      run_pass(sweep.passes[p], data, block, vectors, image * sweep.source_rows, start);
    }
    row = start + block.end;
  }
}

// The same work line by line. The input gradient of a convolution with stride 1 is the convolution
// of the output gradient with the kernel turned around.
template <typename T>
LineSweep<T> line_sweep(const ConvPlan& plan, const SweepData<T>& data, bool input_grad) {
  const ConvGeometry& g = plan.geometry;
  LineSweep<T> sweep = {};
  sweep.terms[0] = data.terms[0];
  sweep.terms[1] = data.terms[1];
  sweep.term_count = data.term_count;
  sweep.images = plan.images;
  sweep.k = data.k;
  sweep.columns = data.columns;
  sweep.vectors = data.columns / kLanes<T> - (data.tail > 0 ? 1 : 0);
  sweep.in_height = input_grad ? g.out_height : g.height;
  sweep.in_width = input_grad ? g.out_width : g.width;
  sweep.out_height = input_grad ? g.height : g.out_height;
  sweep.out_width = input_grad ? g.width : g.out_width;
  sweep.kernel_h = g.kernel_h;
  sweep.pad_h = input_grad ? (g.kernel_h - 1) * g.dilation_h - g.pad_h : g.pad_h;
  sweep.pad_w = input_grad ? g.kernel_w - 1 - g.pad_w : g.pad_w;
  sweep.dilation_h = g.dilation_h;
  sweep.flipped = input_grad;
  sweep.bias = data.bias;
  sweep.out = data.out;
  sweep.accumulate = data.accumulate;
  return sweep;
}

// The forward pass to n output channels, or the input gradient to n input channels.
template <typename T>
void run_direction(const ConvPlan& plan, SweepData<T> data, Index n, bool input_grad, Share share) {
  const ConvGeometry& g = plan.geometry;
  const ConvSweep& sweep = input_grad ? plan.input_grad : plan.forward;
  const Index weights = Index{g.kernel_h} * g.kernel_w * data.k;
  T tails[2 * kTailElements];
  data.tail = gathered_columns<T>(n, plan.images * sweep.destination_rows, weights, data.k);
  data.tail_step = weights;
  gather_tails(data.terms, data.term_count, weights, n, data.tail, tails);
  const LineSweep<T> lines = line_sweep(plan, data, input_grad);
  Range left = {lines.vectors, data.columns / kLanes<T>};
  if (lines.vectors == 0) {
    // All of it is left.
  } else if (winograd_serves<T>(g, plan.images, data.k, data.terms[0].lda)) {
    winograd_sweep(lines, share);
  } else if (sweeps_by_line<T>(g, lines.out_width, lines.vectors * kLanes<T>)) {
    sweep_lines(lines, share);
  } else {
    left.begin = 0;
  }
  if (left.begin < left.end) run_sweep(sweep, plan.images, data, left, share);
}

template <typename T>
void weight_grad_by_tap(const ConvPlan& plan, const ProductTerm<T> (&terms)[2], int term_count,
                        T* gw, bool accumulate, Share share) {
  const ConvGeometry& g = plan.geometry;
  const ConvWeightWalk& walk = plan.weight_grad;
  const Index ld = padded_to_lanes<T>(g.out_channels);
  const Columns columns =
      columns_of<T>(g.out_channels, g.in_channels, walk.scopes * walk.units * walk.unit_output);
  const Index per_tap = outer_units<T>(g.in_channels, columns);
  const Range mine = split(per_tap * g.kernel_h * g.kernel_w, share);
  const Index block_bytes = walk.block_units * walk.unit_output * ld * Index{sizeof(T)};
  const bool halve = term_count * block_bytes > kPairedBytes;
  const Index block = larger(halve ? walk.block_units / 2 : walk.block_units, 1);
  for (Index scope = 0; scope < walk.scopes; ++scope) {
    for (Index begin = 0; begin < walk.units; begin += block) {
      const bool add = accumulate || scope > 0 || begin > 0;
      for (Index unit = mine.begin; unit < mine.end;) {
        const Index tap = unit / per_tap;
        const Range units = {unit - tap * per_tap, smaller(mine.end - tap * per_tap, per_tap)};
        unit = tap * per_tap + units.end;
        const ConvTapPairs& pairs = walk.taps[tap];
        const Index first = larger(begin, pairs.first_unit);
        const Index last = smaller(smaller(begin + block, walk.units), pairs.last_unit);
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
        multiply_outer(product, g.in_channels, columns, units);
      }
    }
  }
}

// Narrow inputs: a line of the input is laid out so that what one tap and channel multiply along a
// line of the output lies side by side. The weight gradient is then a product whose rows are taps
// and channels, all in one register tile.
struct NarrowLayout {
  Index run;    // values of one channel and phase: every stride-th column of the padded line
  Index line;   // values of one padded line
  Index lines;  // padded lines that an output line spans
  Index k;      // taps times channels

  explicit NarrowLayout(const ConvGeometry& g)
      : run(divide_up(g.width + 2 * g.pad_w, g.stride_w) + g.dilation_w * (g.kernel_w - 1)),
        line(run * g.stride_w * g.in_channels),
        lines(Index{g.dilation_h} * (g.kernel_h - 1) + 1),
        k(Index{g.kernel_h} * g.kernel_w * g.in_channels) {}

  // Output lines whose inputs fit the buffer.
  Index fitting(const ConvGeometry& g) const {
    const Index spare = kNarrowElements / line - lines;
    return spare < 0 ? 0 : spare / g.stride_h + 1;
  }
};

template <typename T>
void lay_out_lines(const ConvGeometry& g, const NarrowLayout& layout, const T* image, Index ldx,
                   Range padded_lines, T* out) {
  for (Index i = 0; i < (padded_lines.end - padded_lines.begin) * layout.line; ++i) out[i] = 0;
  for (Index h = padded_lines.begin; h < padded_lines.end; ++h, out += layout.line) {
    if (h < g.pad_h || h >= g.pad_h + g.height) continue;
    const T* line = image + (h - g.pad_h) * g.width * ldx;
    for (Index channel = 0; channel < g.in_channels; ++channel) {
      for (Index phase = 0; phase < g.stride_w; ++phase) {
        T* run = out + (channel * g.stride_w + phase) * layout.run;
        // The first column of this phase inside the image, counted with the padding.
        const Index skipped = divide_up(larger(g.pad_w - phase, 0), g.stride_w);
        Index column = phase + skipped * g.stride_w - g.pad_w;
        for (T* to = run + skipped; column < g.width; column += g.stride_w) {
          *to++ = line[column * ldx + channel];
        }
      }
    }
  }
}

// Where the values of each tap and channel start in the layout.
void narrow_offsets(const ConvGeometry& g, const NarrowLayout& layout, std::int32_t* offsets) {
  for (Index i = 0; i < layout.k; ++i) {
    const Index channel = i % g.in_channels, tap = i / g.in_channels;
    const Index column = tap % g.kernel_w * g.dilation_w, h = tap / g.kernel_w * g.dilation_h;
    const Index run = channel * g.stride_w + column % g.stride_w;
    offsets[i] =
        static_cast<std::int32_t>(h * layout.line + run * layout.run + column / g.stride_w);
  }
}

template <typename T>
void weight_grad_narrow(const ConvPlan& plan, const ProductTerm<T> (&terms)[2], int term_count,
                        T* gw, bool accumulate, Share share) {
  const ConvGeometry& g = plan.geometry;
  const NarrowLayout layout(g);
  const Index ld = padded_to_lanes<T>(g.out_channels);
  const Range mine = split(layout.k, share);
  std::int32_t offsets[kNarrowRows], rows[kNarrowRows];
  narrow_offsets(g, layout, offsets);
  for (Index i = 0; i < layout.k; ++i) rows[i] = static_cast<std::int32_t>(i);
  const Index cached = kNarrowOutputs / (g.out_width * ld) + 1;
  const Index block = smaller(smaller(layout.fitting(g), cached), kMaxSegments);
  alignas(64) T buffer[kNarrowElements];
  T tails[kTailElements];
  bool add = accumulate;
  for (int t = 0; t < term_count; ++t) {
    for (Index image = 0; image < plan.images; ++image) {
      for (Index first = 0; first < g.out_height; first += block) {
        const Index count = smaller(block, g.out_height - first);
        const Index top = first * g.stride_h;
        lay_out_lines(g, layout, terms[t].a + image * g.height * g.width * terms[t].lda,
                      terms[t].lda, {top, top + (count - 1) * g.stride_h + layout.lines}, buffer);
        Segment segments[kMaxSegments];
        for (Index i = 0; i < count; ++i) {
          segments[i] = {i * g.stride_h * layout.line, i * g.out_width, g.out_width};
        }
        const T* gy = terms[t].b + (image * g.out_height + first) * g.out_width * ld;
        const Index outputs = count * g.out_width;
        RowProduct<T> product = {
            {{buffer, 1, gy}, {}},
            1,
            segments,
            static_cast<int>(count),
            nullptr,
            gw,
            ld,
            add,
            gathered_columns<T>(g.out_channels, layout.k, outputs, g.out_width),
            outputs};
        gather_tails(product.terms, 1, outputs, g.out_channels, product.tail, tails);
        multiply_rows(product, offsets, rows, mine.begin, mine.end - mine.begin,
                      {0, ld / kLanes<T>});
        add = true;
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
                             false,
                             0,
                             0};
  run_direction(plan, data, g.out_channels, false, share);
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
                             accumulate,
                             0,
                             0};
  run_direction(plan, data, g.in_channels, true, share);
}

template <typename T>
void conv_weight_grad(const ConvPlan& plan, const T* x, Index ldx, const T* gy, const T* x2,
                      const T* gy2, T* gw, bool accumulate, Share share) {
  const ConvGeometry& g = plan.geometry;
  const ProductTerm<T> terms[2] = {{x, ldx, gy}, {x2, ldx, gy2}};
  const int term_count = x2 ? 2 : 1;
  const NarrowLayout layout(g);
  if (winograd_serves<T>(g, plan.images, g.in_channels, ldx)) {
    winograd_weight_grad(plan, terms, term_count, gw, accumulate, share);
  } else if (g.in_channels <= kNarrow && layout.k <= kNarrowRows && layout.fitting(g) > 0) {
    weight_grad_narrow(plan, terms, term_count, gw, accumulate, share);
  } else if (weight_grad_by_line<T>(g)) {
    weight_grad_lines(plan, terms, term_count, gw, accumulate, share);
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
