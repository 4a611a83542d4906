// Which places a grouped convolution multiplies, worked out once per geometry. Knows no
// instruction set.
#pragma once

#include <vector>

#include "kernels.h"

namespace fastmaml {

// Both directions of a convolution; what their pointers point to is the plan's own.
class GroupedConvPlan {
 public:
  // Channels are those of all groups.
  GroupedConvPlan(const ConvGeometry& geometry, Index groups);
  GroupedConvPlan(const GroupedConvPlan&) = delete;
  GroupedConvPlan& operator=(const GroupedConvPlan&) = delete;

  const GroupedSweep& forward() const { return forward_; }
  const GroupedSweep& input_grad() const { return input_grad_; }

 private:
  struct Lists {
    std::vector<GroupedRun> runs;
    std::vector<GroupedTap> taps;
    GroupedAxis axis() const { return {runs.data(), static_cast<int>(runs.size()), taps.data()}; }
  };
  struct Window {
    int kernel, stride, padding, dilation;
  };
  enum class Direction { kForward, kInputGrad };

  static Lists lists(Direction direction, int places, int sources, const Window& window,
                     bool joined);

  Lists forward_lines_, forward_columns_, back_lines_, back_columns_;
  GroupedSweep forward_, input_grad_;
};

}  // namespace fastmaml
