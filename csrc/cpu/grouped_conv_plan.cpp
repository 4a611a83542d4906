#include "grouped_conv_plan.h"

#include <algorithm>

namespace fastmaml {

// `joined`: places that draw on the same taps become one run, by phases of the step between them;
// else each is a run, in their order.
GroupedConvPlan::Lists GroupedConvPlan::lists(Direction direction, int places, int sources,
                                              const Window& window, bool joined) {
  const bool back = direction == Direction::kInputGrad;
  const int step = joined && back ? window.stride : 1;
  const int source_step = back ? 1 : window.stride;
  const auto taps_of = [&](int place) {
    std::vector<GroupedTap> taps;
    for (int tap = 0; tap < window.kernel; ++tap) {
      const int reach = tap * window.dilation - window.padding;
      const int source = back ? place - reach : place * window.stride + reach;
      if (back && source % window.stride != 0) continue;
      const int from = back ? source / window.stride : source;
      if (source >= 0 && from < sources) taps.push_back({tap, from});
    }
    return taps;
  };
  Lists found;
  const auto goes_on = [&](const GroupedRun& run, const std::vector<GroupedTap>& taps) {
    return run.tap_count == static_cast<int>(taps.size()) &&
           std::equal(taps.begin(), taps.end(), found.taps.begin() + run.first_tap,
                      [&](const GroupedTap& next, const GroupedTap& first) {
                        return next.tap == first.tap &&
                               next.source == first.source + run.count * source_step;
                      });
  };
  for (int phase = 0; phase < step; ++phase) {
    for (int place = phase; place < places; place += step) {
      const std::vector<GroupedTap> taps = taps_of(place);
      if (joined && place > phase && goes_on(found.runs.back(), taps)) {
        ++found.runs.back().count;
        continue;
      }
      found.runs.push_back({place, step, 1, source_step, static_cast<int>(found.taps.size()),
                            static_cast<int>(taps.size())});
      found.taps.insert(found.taps.end(), taps.begin(), taps.end());
    }
  }
  return found;
}

GroupedConvPlan::GroupedConvPlan(const ConvGeometry& g, Index groups) {
  const Window high = {g.kernel_h, g.stride_h, g.pad_h, g.dilation_h};
  const Window wide = {g.kernel_w, g.stride_w, g.pad_w, g.dilation_w};
  forward_lines_ = lists(Direction::kForward, g.out_height, g.height, high, false);
  forward_columns_ = lists(Direction::kForward, g.out_width, g.width, wide, true);
  back_lines_ = lists(Direction::kInputGrad, g.height, g.out_height, high, false);
  back_columns_ = lists(Direction::kInputGrad, g.width, g.out_width, wide, true);
  const Index in = g.in_channels / groups, out = g.out_channels / groups;
  forward_ = {
      groups, in, g.height, g.width,    out,        g.out_height,          g.out_width,
      1,      in, in * out, g.kernel_h, g.kernel_w, forward_lines_.axis(), forward_columns_.axis()};
  input_grad_ = {
      groups, out, g.out_height, g.out_width, in,         g.height,           g.width,
      in,     1,   in * out,     g.kernel_h,  g.kernel_w, back_lines_.axis(), back_columns_.axis()};
}

}  // namespace fastmaml
