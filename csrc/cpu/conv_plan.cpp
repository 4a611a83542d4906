#include "conv_plan.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>

namespace fastmaml {
namespace {

constexpr Index kWeightBytes = 256 * 1024;  // weights of one pass: they stream from L2
constexpr Index kBlockBytes = 384 * 1024;   // activations that stay in L2 between passes
constexpr Index kPairBytes = 20 * 1024;     // output gradients that stay in L1 between tiles
constexpr int kMaxTaps = 64;                // of one pass (a bit mask names them)
constexpr Index kSmallImage = 64;           // positions: below, whole images are a unit

struct Axis {
  int size, out_size, kernel, stride, pad, dilation;

  // Input index of an output index and a tap, or -1 in the padding.
  int input(int out, int tap) const {
    const int in = out * stride + tap * dilation - pad;
    return in >= 0 && in < size ? in : -1;
  }
  // Output index that meets an input index through a tap, or -1.
  int output(int in, int tap) const {
    const int scaled = in + pad - tap * dilation;
    if (scaled < 0 || scaled % stride != 0) return -1;
    return scaled / stride < out_size ? scaled / stride : -1;
  }
};

struct Axes {
  Axis h, w;
  explicit Axes(const ConvGeometry& g)
      : h{g.height, g.out_height, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h},
        w{g.width, g.out_width, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w} {}
  int taps() const { return h.kernel * w.kernel; }
  int inputs() const { return h.size * w.size; }
  int outputs() const { return h.out_size * w.out_size; }
};

enum class Direction { kForward, kInputGrad };

// Source row of a destination row through a tap, within one image, or -1.
int source_row(const Axes& axes, Direction direction, int row, int tap) {
  const int tap_h = tap / axes.w.kernel, tap_w = tap % axes.w.kernel;
  if (direction == Direction::kForward) {
    const int h = axes.h.input(row / axes.w.out_size, tap_h);
    const int w = axes.w.input(row % axes.w.out_size, tap_w);
    return h < 0 || w < 0 ? -1 : h * axes.w.size + w;
  }
  const int h = axes.h.output(row / axes.w.size, tap_h);
  const int w = axes.w.output(row % axes.w.size, tap_w);
  return h < 0 || w < 0 ? -1 : h * axes.w.out_size + w;
}

struct Pass {
  std::vector<std::int32_t> taps, shifts, source, destination;
  bool accumulate;
};

// The passes of one image when taps are taken `chunk` at a time.
std::vector<Pass> image_passes(const Axes& axes, Direction direction, int chunk) {
  const int rows = direction == Direction::kForward ? axes.outputs() : axes.inputs();
  const int chunks = (axes.taps() + chunk - 1) / chunk;
  std::vector<Pass> passes;
  for (int c = 0; c < chunks; ++c) {
    const int begin = axes.taps() * c / chunks, end = axes.taps() * (c + 1) / chunks;
    std::map<std::uint64_t, std::size_t> pass_of_mask;
    for (int row = 0; row < rows; ++row) {
      std::uint64_t mask = 0;
      int first = -1;
      for (int tap = begin; tap < end; ++tap) {
        const int source = source_row(axes, direction, row, tap);
        if (source < 0) continue;
        mask |= std::uint64_t{1} << (tap - begin);
        if (first < 0) first = source;
      }
      if (mask == 0 && c > 0) continue;
      const auto found = pass_of_mask.emplace(mask, passes.size());
      if (found.second) {
        passes.emplace_back();
        passes.back().accumulate = c > 0;
        for (int tap = begin; tap < end; ++tap) {
          const int source = source_row(axes, direction, row, tap);
          if (source < 0) continue;
          passes.back().taps.push_back(tap);
          passes.back().shifts.push_back(source - first);
        }
      }
      Pass& pass = passes[found.first->second];
      pass.source.push_back(std::max(first, 0));
      pass.destination.push_back(row);
    }
  }
  return passes;
}

// A rough count of cycles, enough to choose between ways of taking the taps.
double estimated_cost(const std::vector<Pass>& passes, Index images, Index k, int vectors,
                      int tile_rows) {
  constexpr double kLatency = 4, kPassOverhead = 60, kTileOverhead = 20, kTapOverhead = 12;
  double cost = 0;
  for (const Pass& pass : passes) {
    const Index rows = static_cast<Index>(pass.source.size()) * images;
    const double tiles = static_cast<double>((rows + tile_rows - 1) / tile_rows);
    const double registers = static_cast<double>(rows) / tiles * vectors;
    const double step = std::max(registers / 2, kLatency);
    const double taps = static_cast<double>(pass.taps.size());
    cost += kPassOverhead + tiles * (kTileOverhead + 2 * registers +
                                     taps * (kTapOverhead + static_cast<double>(k) * step));
  }
  return cost;
}

struct SweepStorage {
  std::vector<Pass> passes;
  std::vector<ConvPass> views;
};

void repeat_for_images(Pass* pass, Index images, Index source_rows, Index destination_rows) {
  const std::size_t rows = pass->source.size();
  for (Index image = 1; image < images; ++image) {
    for (std::size_t i = 0; i < rows; ++i) {
      pass->source.push_back(static_cast<std::int32_t>(pass->source[i] + image * source_rows));
      pass->destination.push_back(
          static_cast<std::int32_t>(pass->destination[i] + image * destination_rows));
    }
  }
}

ConvSweep make_sweep(const ConvGeometry& g, Direction direction, Index images,
                     const ConvBlocking& blocking, SweepStorage* storage) {
  const Axes axes(g);
  const bool forward = direction == Direction::kForward;
  const Index k = forward ? g.in_channels : g.out_channels;
  const Index n = forward ? g.out_channels : g.in_channels;
  const Index vectors = padded(n, blocking.lanes) / blocking.lanes;
  const Index panels = (vectors + blocking.panel_vectors - 1) / blocking.panel_vectors;
  const int panel = static_cast<int>((vectors + panels - 1) / panels);

  ConvSweep sweep{};
  sweep.source_rows = forward ? axes.inputs() : axes.outputs();
  sweep.destination_rows = forward ? axes.outputs() : axes.inputs();
  const Index image_bytes =
      (sweep.source_rows * k + sweep.destination_rows * n) * blocking.scalar_bytes;
  sweep.images = std::clamp<Index>(kBlockBytes / image_bytes, 1, images);
  sweep.block_rows = sweep.images * sweep.destination_rows;
  if (image_bytes > kBlockBytes) {
    const int lines = forward ? g.out_height : g.height;
    sweep.block_rows = std::max<Index>(1, lines * kBlockBytes / image_bytes / 2) *
                       (sweep.destination_rows / lines);
  }

  const Index tap_bytes = k * panel * blocking.lanes * blocking.scalar_bytes;
  const Index most =
      std::clamp<Index>(kWeightBytes / tap_bytes, 1, std::min(axes.taps(), kMaxTaps));
  double best = 0;
  for (const Index chunk : {most, std::min<Index>(most, g.kernel_w), Index{1}}) {
    std::vector<Pass> passes = image_passes(axes, direction, static_cast<int>(chunk));
    const double cost = estimated_cost(passes, sweep.images, k, panel, blocking.tile_rows);
    if (!storage->passes.empty() && cost >= best) continue;
    best = cost;
    storage->passes = std::move(passes);
  }
  for (Pass& pass : storage->passes) {
    repeat_for_images(&pass, sweep.images, sweep.source_rows, sweep.destination_rows);
    storage->views.push_back({pass.taps.data(), pass.shifts.data(),
                              static_cast<int>(pass.taps.size()), pass.source.data(),
                              pass.destination.data(), static_cast<Index>(pass.source.size()),
                              pass.accumulate});
  }
  sweep.passes = storage->views.data();
  sweep.pass_count = static_cast<int>(storage->views.size());
  return sweep;
}

struct WalkStorage {
  std::vector<std::vector<RowPair>> lists;
  std::vector<ConvTapPairs> taps;
};

// Units are images: every tap has its own list.
void list_image_pairs(const Axes& axes, Index block, Index units, WalkStorage* storage) {
  for (int tap = 0; tap < axes.taps(); ++tap) {
    std::vector<RowPair> pairs;
    for (Index image = 0; image < block; ++image) {
      for (int out = 0; out < axes.outputs(); ++out) {
        const int in = source_row(axes, Direction::kForward, out, tap);
        if (in < 0) continue;
        pairs.push_back({static_cast<std::int32_t>(image * axes.inputs() + in),
                         static_cast<std::int32_t>(image * axes.outputs() + out)});
      }
    }
    const Index per_unit = static_cast<Index>(pairs.size()) / block;
    storage->taps.push_back({nullptr, per_unit, 0, units, 0});
    storage->lists.push_back(std::move(pairs));
  }
  for (int tap = 0; tap < axes.taps(); ++tap) {
    storage->taps[tap].pairs = storage->lists[tap].data();
  }
}

// Units are lines of one image: the taps of one kernel column share a list.
void list_line_pairs(const Axes& axes, Index block, WalkStorage* storage) {
  for (int tap_w = 0; tap_w < axes.w.kernel; ++tap_w) {
    std::vector<RowPair> pairs;
    for (Index line = 0; line < block; ++line) {
      for (int out = 0; out < axes.w.out_size; ++out) {
        const int in = axes.w.input(out, tap_w);
        if (in < 0) continue;
        pairs.push_back({static_cast<std::int32_t>(line * axes.h.stride * axes.w.size + in),
                         static_cast<std::int32_t>(line * axes.w.out_size + out)});
      }
    }
    storage->lists.push_back(std::move(pairs));
  }
  for (int tap_h = 0; tap_h < axes.h.kernel; ++tap_h) {
    Index first = 0, last = axes.h.out_size;
    while (first < last && axes.h.input(static_cast<int>(first), tap_h) < 0) ++first;
    while (last > first && axes.h.input(static_cast<int>(last - 1), tap_h) < 0) --last;
    const Index start = Index{axes.w.size} * (tap_h * axes.h.dilation - axes.h.pad);
    for (const auto& pairs : storage->lists) {
      const Index per_unit = static_cast<Index>(pairs.size()) / block;
      storage->taps.push_back({pairs.data(), per_unit, first, last, start});
    }
  }
}

ConvWeightWalk make_walk(const ConvGeometry& g, Index images, const ConvBlocking& blocking,
                         WalkStorage* storage) {
  const Axes axes(g);
  const Index row_bytes = padded(g.out_channels, blocking.lanes) * blocking.scalar_bytes;
  const Index block_rows = std::clamp<Index>(kPairBytes / row_bytes, 32, 160);
  const bool by_images = axes.outputs() <= kSmallImage;
  ConvWeightWalk walk{};
  walk.scopes = by_images ? 1 : images;
  walk.units = by_images ? images : g.out_height;
  const Index unit_rows = by_images ? axes.outputs() : g.out_width;
  const Index blocks = std::max<Index>(1, (walk.units * unit_rows + block_rows / 2) / block_rows);
  walk.block_units = std::max<Index>(1, (walk.units + blocks - 1) / blocks);
  walk.scope_input = axes.inputs();
  walk.scope_output = axes.outputs();
  walk.unit_input = by_images ? axes.inputs() : g.stride_h * g.width;
  walk.unit_output = unit_rows;
  if (by_images) {
    list_image_pairs(axes, walk.block_units, walk.units, storage);
  } else {
    list_line_pairs(axes, walk.block_units, storage);
  }
  walk.taps = storage->taps.data();
  return walk;
}

struct OwningPlan : ConvPlan {
  SweepStorage forward_storage, input_grad_storage;
  WalkStorage walk_storage;
};

}  // namespace

ConvPlan* make_conv_plan(const ConvGeometry& geometry, Index images, const ConvBlocking& blocking) {
  auto plan = std::make_unique<OwningPlan>();
  plan->geometry = geometry;
  plan->images = images;
  plan->forward =
      make_sweep(geometry, Direction::kForward, images, blocking, &plan->forward_storage);
  plan->input_grad =
      make_sweep(geometry, Direction::kInputGrad, images, blocking, &plan->input_grad_storage);
  plan->weight_grad = make_walk(geometry, images, blocking, &plan->walk_storage);
  return plan.release();
}

void free_conv_plan(ConvPlan* plan) { delete static_cast<OwningPlan*>(plan); }

}  // namespace fastmaml
