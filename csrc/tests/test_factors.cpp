// Meta-steps that keep wide weights in factors against those that write them out for every task,
// which they do where the adapted parameters are asked for.
#include "check.h"
#include "cpu/program_factors.h"
#include "cpu/program_plan.h"
#include "program_builder.h"

namespace {

using namespace fastmaml_test;
using fastmaml::MetaStepArgs;
using Values = std::vector<double>;

constexpr Index kTasks = 18, kSupport = 3, kQuery = 3;  // more tasks than groups of tasks

struct Problem {
  std::string name;
  ProgramSpec spec;
  std::size_t weights;  // that are to be in factors
};

struct Results {
  Values losses, theta, phi, stats;
};

// Every size but a multiple of a vector's lanes, and layers with nothing but a weight to move.
ProgramSpec wide_layers() {
  ProgramBuilder p({150});
  int h = p.activation(p.linear(0, 131), "tanh");
  h = p.op("linear", {h}, {137}, {p.slot({137, 131}), -1}, {});
  h = p.activation(p.batch_norm(p.linear(h, 160), true, true), "relu");
  p.linear(h, 4);
  return p.spec();
}

// Over places of a sequence, behind a frozen layer; the narrow ones are written out.
ProgramSpec wide_sequence() {
  ProgramBuilder p({2, 140});
  p.adapt(false);
  int h = p.activation(p.linear(0, 20), "tanh");
  p.adapt(true);
  h = p.op("linear", {0}, {2, 170}, {p.slot({170, 140}), -1}, {});
  h = p.activation(p.linear(h, 180), "tanh");
  p.linear(p.mean(h, {0}), 4);
  return p.spec();
}

// The same weight twice, which cannot be in factors, and one that can.
ProgramSpec used_twice() {
  ProgramBuilder p({150});
  const int weight = p.slot({150, 150});
  int h = p.activation(p.op("linear", {0}, {150}, {weight, -1}, {}), "tanh");
  h = p.activation(p.op("linear", {h}, {150}, {weight, -1}, {}), "tanh");
  p.linear(p.activation(p.linear(h, 150), "tanh"), 4);
  return p.spec();
}

class Meta {
 public:
  Meta(const Problem& problem, Index steps)
      : spec_(problem.spec), program_(make_program(spec_)), sizes_(program_->sizes()) {
    const Index input = element_count(spec_.values[0]);
    theta_ = random_values<double>(sizes_.theta, 0.1);
    phi_ = random_values<double>(sizes_.shared);
    support_x_ = random_values<double>(kTasks * kSupport * input);
    query_x_ = random_values<double>(kTasks * kQuery * input);
    for (Index i = 0; i < kTasks * kQuery; ++i) labels_.push_back(i * 7 % 4);
    args_.theta = theta_.data();
    args_.shared = phi_.data();
    args_.support_x = support_x_.data();
    args_.query_x = query_x_.data();
    args_.support_y = args_.query_y = labels_.data();
    args_.support_examples = kSupport;
    args_.query_examples = kQuery;
    args_.tasks = kTasks;
    args_.steps = steps;
    args_.rate = 0.02;
  }

  Results run(bool written_out, bool first_order, int threads = 1,
              std::size_t budget = std::size_t{1} << 30) const {
    Results out{poisoned<double>(kTasks), poisoned<double>(sizes_.theta),
                poisoned<double>(sizes_.shared),
                poisoned<double>(kTasks * (args_.steps + 1) * sizes_.stats)};
    Values adapted = poisoned<double>(written_out ? kTasks * sizes_.theta : 0);
    MetaStepArgs args = args_;
    args.losses = out.losses.data();
    args.gtheta = out.theta.data();
    args.gshared = sizes_.shared > 0 ? out.phi.data() : nullptr;
    args.stats = out.stats.data();
    args.adapted = written_out ? adapted.data() : nullptr;
    args.first_order = first_order;
    args.threads = threads;
    args.memory_budget_bytes = budget;
    program_->meta_step(args);
    return out;
  }

  // How many of the weights are kept in factors.
  std::size_t in_factors() const {
    Values gradient(1);
    MetaStepArgs args = args_;
    args.gtheta = gradient.data();
    const auto plan = fastmaml::make_plan<double>(spec_, fastmaml::kernels<double>());
    const auto memory = std::make_shared<fastmaml::ArenaPool>();
    return fastmaml::FactoredWeights<double>(plan, *memory, args, 1).offsets().size();
  }

 private:
  ProgramSpec spec_;
  std::shared_ptr<fastmaml::Program> program_;
  fastmaml::ProgramSizes sizes_;
  Values theta_, phi_, support_x_, query_x_;
  std::vector<std::int64_t> labels_;
  MetaStepArgs args_;
};

void check_same(const Results& got, const Results& expected, double units,
                const std::string& name) {
  check_close(got.losses, expected.losses, units, name + ": losses", 1);
  check_close(got.theta, expected.theta, units, name + ": theta", 1);
  check_close(got.phi, expected.phi, units, name + ": phi", 1);
  check_close(got.stats, expected.stats, units, name + ": stats", 1);
}

void check_problem(const Problem& problem, Index steps) {
  const Meta meta(problem, steps);
  const std::string name = problem.name + ", " + std::to_string(steps) + " steps";
  check(meta.in_factors() == problem.weights, name + ": weights in factors");
  for (const bool first_order : {false, true}) {
    const Results got = meta.run(false, first_order);
    check_same(got, meta.run(true, first_order), 400, name + (first_order ? ", first order" : ""));
    for (const int threads : {2, 3, 40}) {
      check_same(meta.run(false, first_order, threads), got, 0, name + ", threads");
    }
    check_same(meta.run(false, first_order, 1, 1), got, 0, name + ", recomputed");
  }
}

}  // namespace

int main() {
  for (const Index steps : {1, 3}) {
    check_problem({"wide layers", wide_layers(), 3}, steps);
    check_problem({"wide sequence", wide_sequence(), 2}, steps);
    check_problem({"used twice", used_twice(), 1}, steps);
  }
  return report("factors");
}
