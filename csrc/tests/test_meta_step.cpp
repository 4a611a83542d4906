// The meta-gradient against finite differences of the losses, and its independence of threads and
// of the memory budget.
#include <stdexcept>

#include "check.h"
#include "cpu/kernels.h"
#include "differences.h"
#include "program_cases.h"

namespace {

using namespace fastmaml_test;
using Values = std::vector<double>;

constexpr Index kTasks = 18, kSupport = 4, kQuery = 5;  // more tasks than groups of tasks

struct Variant {
  std::string name;
  Index steps;
  Index rate_steps;  // 0: no per-parameter rates
  bool squared_error;
  bool adaptive = false;  // moments and clipped gradients instead of plain steps
};

constexpr int kCoefficients = fastmaml::kInnerCoefficients;

struct Inputs {
  Values theta, phi, rates, coefficients;  // coefficients: [kCoefficients][steps]
};

struct Results {
  Values losses, theta, phi, rates, coefficients, adapted, predictions, stats, mean_loss;
};

class Meta {
 public:
  Meta(const ProgramCase& c, const Variant& variant)
      : variant_(variant),
        program_(make_program(c.spec)),
        sizes_(program_->sizes()),
        output_size_(element_count(c.spec.values[c.spec.output])),
        buffers_(random_values<double>(sizes_.buffers)) {
    for (double& value : buffers_) value = 0.5 + std::fabs(value);
    const Index input_size = element_count(c.spec.values[0]);
    support_x_ = random_values<double>(kTasks * kSupport * input_size);
    query_x_ = random_values<double>(kTasks * kQuery * input_size);
    support_y_ = random_values<double>(kTasks * kSupport * output_size_);
    query_y_ = random_values<double>(kTasks * kQuery * output_size_);
    for (Index i = 0; i < kTasks * kQuery; ++i) labels_.push_back(i * 7 % 5 % output_size_);
  }

  Inputs random_inputs() const {
    Inputs in{random_values<double>(sizes_.theta, 0.5), random_values<double>(sizes_.shared),
              random_values<double>(variant_.rate_steps * sizes_.theta),
              random_values<double>(variant_.adaptive ? kCoefficients * variant_.steps : 0)};
    for (double& c : in.coefficients) c = 0.2 + 0.3 * std::fabs(c);
    for (double& rate : in.rates) rate = 1 + 0.2 * rate;
    return in;
  }

  Results run(const Inputs& in, bool gradient, bool first_order = false, int threads = 1,
              std::size_t budget = std::size_t{1} << 30) const {
    const Index rate_rows = std::max<Index>(1, variant_.rate_steps);
    Results out{poisoned<double>(kTasks),
                poisoned<double>(sizes_.theta),
                poisoned<double>(sizes_.shared),
                poisoned<double>(rate_rows * sizes_.theta),
                poisoned<double>(static_cast<Index>(in.coefficients.size())),
                poisoned<double>(kTasks * sizes_.theta),
                poisoned<double>(kTasks * kQuery * output_size_),
                poisoned<double>(kTasks * (variant_.steps + 1) * sizes_.stats),
                poisoned<double>(1)};
    fastmaml::MetaStepArgs args;
    args.theta = in.theta.data();
    args.shared = in.phi.data();
    args.buffers = buffers_.data();
    args.support_x = support_x_.data();
    args.query_x = query_x_.data();
    args.support_y = labels_.data();
    args.query_y = labels_.data();
    if (variant_.squared_error) {
      args.loss = fastmaml::TaskLoss::kMeanSquaredError;
      args.support_y = support_y_.data();
      args.query_y = query_y_.data();
    }
    args.support_examples = kSupport;
    args.query_examples = kQuery;
    args.tasks = kTasks;
    args.steps = variant_.steps;
    args.first_order = first_order;
    args.rate = 0.1;
    args.rates = variant_.rate_steps > 0 ? in.rates.data() : nullptr;
    args.rate_steps = rate_rows;
    const fastmaml::InnerUpdateArgs update = update_of(in, gradient, &out);
    args.update = variant_.adaptive ? &update : nullptr;
    args.losses = out.losses.data();
    args.mean_loss = out.mean_loss.data();
    args.adapted = out.adapted.data();
    args.predictions = out.predictions.data();
    args.stats = out.stats.data();
    if (gradient) {
      args.gtheta = out.theta.data();
      args.gshared = sizes_.shared > 0 ? out.phi.data() : nullptr;
      args.grates = variant_.rate_steps > 0 ? out.rates.data() : nullptr;
    }
    args.threads = threads;
    args.memory_budget_bytes = budget;
    program_->meta_step(args);
    return out;
  }

  double mean_loss(const Inputs& in) const {
    const Results out = run(in, false);
    double sum = 0;
    for (double loss : out.losses) sum += loss;
    check(out.mean_loss[0] == sum / kTasks, "the mean of the losses");
    return out.mean_loss[0];
  }

 private:
  fastmaml::InnerUpdateArgs update_of(const Inputs& in, bool gradient, Results* out) const {
    fastmaml::InnerUpdateArgs update;
    update.momentum = update.second_moment = true;
    update.clip_norm = 0.5;
    const Index steps = variant_.steps;
    for (Index c = 0; variant_.adaptive && c < kCoefficients; ++c) {
      update.coefficients.push_back({in.coefficients.data() + c * steps, steps, false,
                                     gradient ? out->coefficients.data() + c * steps : nullptr});
    }
    return update;
  }

  Variant variant_;
  std::shared_ptr<fastmaml::Program> program_;
  fastmaml::ProgramSizes sizes_;
  Index output_size_;
  Values buffers_, support_x_, query_x_, support_y_, query_y_;
  std::vector<std::int64_t> labels_;
};

// The derivative of the mean loss along a random direction in one of the four spaces. Where the
// loss has jumps, of units and windows that change over, there may be one in the way, but not in
// three.
void check_slope(const Meta& meta, const Inputs& at, Values Inputs::* space, const Values& gradient,
                 const ProgramCase& c, const std::string& name) {
  if ((at.*space).empty()) return;
  for (int left = c.smooth ? 1 : 3; left > 0; --left) {
    const Values along = random_values<double>(static_cast<Index>((at.*space).size()));
    double slope = 0;
    for (std::size_t i = 0; i < along.size(); ++i) slope += gradient[i] * along[i];
    const Values expected = central_difference(difference_step(c), [&](double step) {
      Inputs moved = at;
      for (std::size_t i = 0; i < along.size(); ++i) (moved.*space)[i] += step * along[i];
      return Values{meta.mean_loss(moved)};
    });
    const double units = difference_units(c);
    if (left == 1) return check_close<double>({slope}, expected, units, name, 1);
    if (!largest_error<double>({slope}, expected, units, 1)) return;
  }
}

void check_equal(const Results& a, const Results& b, bool rates, const std::string& name) {
  check(a.losses == b.losses, name + ": losses");
  check(a.theta == b.theta, name + ": theta");
  check(a.phi == b.phi, name + ": phi");
  check(!rates || a.rates == b.rates, name + ": rates");
  check(a.coefficients == b.coefficients, name + ": coefficients");
  check(a.adapted == b.adapted, name + ": adapted");
  check(a.predictions == b.predictions, name + ": predictions");
  check(a.stats == b.stats, name + ": stats");
}

void check_variant(const ProgramCase& c, const Variant& variant) {
  const Meta meta(c, variant);
  const std::string name = c.name + ", " + variant.name;
  const Inputs at = meta.random_inputs();
  const Results got = meta.run(at, true);
  check_slope(meta, at, &Inputs::theta, got.theta, c, name + ": theta");
  check_slope(meta, at, &Inputs::phi, got.phi, c, name + ": phi");
  check_slope(meta, at, &Inputs::rates, got.rates, c, name + ": rates");
  check_slope(meta, at, &Inputs::coefficients, got.coefficients, c, name + ": coefficients");
  const bool rates = variant.rate_steps > 0;
  for (int threads : {2, 3, 40}) {
    if (few_cases() && threads != 3) continue;
    check_equal(meta.run(at, true, false, threads), got, rates,
                name + ", " + std::to_string(threads) + " threads");
  }
  check_equal(meta.run(at, true, false, 1, 1), got, rates, name + ", recomputed");
}

// See test_program.cpp: the in-place ReLU against its twin that is not.
void check_in_place() {
  const Variant variant{"", 2, 1, false};
  generator().seed(1);
  const Meta in_place({"relu", strided_convnet("relu", false, true, true)}, variant);
  generator().seed(1);
  const Meta plain({"clamp", strided_convnet("hardtanh", false, true, true)}, variant);
  const Inputs at = plain.random_inputs();
  check_equal(in_place.run(at, true), plain.run(at, true), true, "in place");
}

// Without a step, first order is exact; with steps it must differ from second order.
void check_first_order(const ProgramCase& c) {
  const Meta none(c, {"no step", 0, 0, false});
  const Inputs at = none.random_inputs();
  check(none.run(at, true, true).theta == none.run(at, true).theta, c.name + ": first order, K=0");
  const Meta some(c, {"two steps", 2, 1, false});
  const Inputs start = some.random_inputs();
  const Results first = some.run(start, true, true), second = some.run(start, true);
  check(first.losses == second.losses, c.name + ": first order changes losses");
  check(first.theta != second.theta, c.name + ": first order is the same as second");
}

void check_bad_label() {
  const auto program = fastmaml::make_program(mlp("tanh"));
  const Values x(3), theta(static_cast<std::size_t>(program->sizes().theta));
  const std::int64_t label = 3;
  Values loss(1);
  fastmaml::MetaStepArgs args;
  args.theta = theta.data();
  args.query_x = x.data();
  args.query_y = &label;
  args.query_examples = 1;
  args.tasks = 1;
  args.steps = 0;
  args.rate_steps = 1;
  args.losses = loss.data();
  try {
    program->meta_step(args);
    fail("a label out of range went through");
  } catch (const std::invalid_argument& error) {
    check(error.what() ==
              std::string(
                  "query_y must be labels in [0, 3), got 3 in task 0; labels are positions in the "
                  "task"),
          error.what());
  }
}

}  // namespace

int main() {
  for (const ProgramCase& c : program_cases()) {
    if (c.classifies) {
      check_variant(c, {"one step", 1, 0, false});
      check_variant(c, {"three steps with rates", 3, 3, false});
    }
    check_variant(c, {"two steps, squared error", 2, 1, true});
  }
  for (ProgramCase c : program_cases()) {
    c.smooth = false;  // |gradient| has a bend at zero
    if (c.classifies) check_variant(c, {"two adaptive steps", 2, 0, false, true});
  }
  check_in_place();
  check_first_order(program_cases()[1]);
  check_bad_label();
  return report("meta_step");
}
