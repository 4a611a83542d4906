// What a meta-step's arguments must be.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "cpu/program.h"

namespace fastmaml {

namespace {

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

bool wants_gradient(const MetaStepArgs& args) {
  if (args.gtheta != nullptr || args.gshared != nullptr || args.grates != nullptr) return true;
  if (args.update == nullptr) return false;
  const auto& coefficients = args.update->coefficients;
  return std::any_of(coefficients.begin(), coefficients.end(),
                     [](const InnerCoefficientArgs& c) { return c.gradient != nullptr; });
}

void check_labels(const void* labels, Index count, Index per_task, Index tasks, Index classes,
                  const char* name) {
  const auto* values = static_cast<const std::int64_t*>(labels);
  for (Index i = 0; i < count; ++i) {
    if (values[i] >= 0 && values[i] < classes) continue;
    throw std::invalid_argument(std::string(name) + " must be labels in [0, " +
                                std::to_string(classes) + "), got " + std::to_string(values[i]) +
                                " in task " + std::to_string(i / per_task % tasks) +
                                "; labels are positions in the task");
  }
}

void check_update(const InnerUpdateArgs& update, const MetaStepArgs& args) {
  require(args.rates == nullptr && args.grates == nullptr,
          "rates must not be given with an update, which has coefficients of its own");
  require(update.coefficients.size() == kInnerCoefficients,
          "update must have as many coefficients as the rule");
  require(update.clip_norm >= 0 && update.clip_value >= 0,
          "clip_norm and clip_value must not be negative");
  for (const InnerCoefficientArgs& c : update.coefficients) {
    require(c.values != nullptr, "update must have values for each coefficient");
    require(c.rows == 1 || c.rows == args.steps,
            "update must have one row of a coefficient, or one for each step");
  }
}

}  // namespace

void check_meta_step(const MetaStepArgs& args, const ProgramSizes& sizes, Index output_rows,
                     Index output_columns) {
  require(args.tasks > 0, "tasks must be at least 1: there is nothing to do without a task");
  require(args.steps >= 0, "steps must not be negative");
  require(args.theta != nullptr || sizes.theta == 0, "theta must be given");
  require(args.shared != nullptr || sizes.shared == 0, "shared must be given");
  require(args.buffers != nullptr || sizes.buffers == 0, "buffers must be given");
  const bool gradient = wants_gradient(args);
  if (args.steps > 0) {
    require(args.support_batches > 0, "support_batches must be at least 1");
    require(args.support_examples > 0 && args.support_x != nullptr && args.support_y != nullptr,
            "support_x and support_y must hold at least one example per task");
  }
  if (args.query_examples > 0) {
    require(args.query_x != nullptr, "query_x must be given where query_examples is not 0");
    require(args.query_y != nullptr || (!gradient && args.losses == nullptr),
            "query_y must be given where losses or gradients are wanted");
  } else {
    require(!gradient && args.losses == nullptr && args.predictions == nullptr,
            "query_examples must be at least 1 where losses, predictions or gradients are wanted");
  }
  require(args.mean_loss == nullptr || args.losses != nullptr,
          "losses must be given where their mean is wanted");
  if (args.update != nullptr) check_update(*args.update, args);
  require(args.rate_steps == 1 || args.rate_steps == args.steps,
          "rate_steps must be 1 or the number of steps");
  if (args.loss != TaskLoss::kCrossEntropy) return;
  require(output_rows == 1,
          "cross_entropy needs one row of class scores per example as the program's output");
  if (args.steps > 0) {
    check_labels(args.support_y, args.support_batches * args.tasks * args.support_examples,
                 args.support_examples, args.tasks, output_columns, "support_y");
  }
  if (args.query_y != nullptr) {
    check_labels(args.query_y, args.tasks * args.query_examples, args.query_examples, args.tasks,
                 output_columns, "query_y");
  }
}

}  // namespace fastmaml
