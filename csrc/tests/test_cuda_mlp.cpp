// The small-network kernel, compiled for the host, against the CPU's program in float64.
#include <stdexcept>

#include "check.h"
#include "cpu/activation_names.h"
#include "cuda/task_means.h"
#include "fastmaml/device.h"
#include "program_builder.h"

namespace {

using namespace fastmaml_test;
using fastmaml::MlpLayer;
using fastmaml::MlpMetaStep;
using fastmaml::Stream;
using fastmaml::TaskLoss;
using Values = std::vector<double>;

struct Case {
  std::string name;
  std::vector<Index> widths;
  std::string activation;
  TaskLoss loss;
  Index tasks, support, query, steps, rate_steps;  // rate_steps 0: one rate for all
  bool first_order = false, last_too = false;      // last_too: an activation after the last layer
  Index batches = 1;
};

struct Results {
  Values losses, mean_loss, gtheta, grates, adapted, predictions;
  Index launches = 0;
};

class Problem {
 public:
  explicit Problem(const Case& c) : c_(c), builder_({c.widths.front()}) {
    const std::vector<Index>& w = c.widths;
    for (std::size_t l = 1; l < w.size(); ++l) {
      const bool active = !c.activation.empty() && (l + 1 < w.size() || c.last_too);
      MlpLayer layer{w[l - 1], w[l], size_, size_ + w[l] * w[l - 1]};
      size_ += w[l] * (w[l - 1] + 1);
      int value = builder_.linear(builder_.spec().output, w[l]);
      if (active) {
        value = builder_.activation(value, c.activation);
        const auto& attributes = builder_.spec().ops.back().attributes;
        layer.activation = static_cast<int>(*fastmaml::activation_named(c.activation));
        layer.alpha = std::get<double>(attributes.at("alpha"));
        layer.beta = std::get<double>(attributes.at("beta"));
      }
      layers_.push_back(layer);
    }
    theta_ = random_values<double>(size_, 0.3);
    rates_ = random_values<double>(std::max<Index>(c.rate_steps, 1) * size_, 0.3);
    const Index support = c.batches * c.tasks * c.support, query = c.tasks * c.query;
    support_x_ = random_values<double>(support * w.front());
    query_x_ = random_values<double>(query * w.front());
    support_y_ = random_values<double>(support * w.back());
    query_y_ = random_values<double>(query * w.back());
    for (Index i = 0; i < support + query; ++i) labels_.push_back(i * 7 % 11 % w.back());
  }

  Results by_program() const {
    Results r = empty();
    fastmaml::MetaStepArgs args;
    fill(&args);
    args.losses = r.losses.data();
    args.mean_loss = r.mean_loss.data();
    args.gtheta = r.gtheta.data();
    if (c_.rate_steps > 0) args.grates = r.grates.data();
    args.adapted = r.adapted.data();
    args.predictions = r.predictions.data();
    fastmaml::make_program(builder_.spec())->meta_step(args);
    return r;
  }

  Results by_kernel(int threads) const {
    Results r = empty();
    MlpMetaStep args = kernel_args();
    args.gradient = true;
    args.rates_gradient = c_.rate_steps > 0;
    args.losses = r.losses.data();
    args.mean_loss = r.mean_loss.data();
    args.gtheta = r.gtheta.data();
    args.grates = r.grates.data();
    args.adapted = r.adapted.data();
    args.predictions = r.predictions.data();
    const auto& kernels = *fastmaml::emulated_kernels();
    auto scratch = poisoned<double>(kernels.mlp_scratch_bytes(args) / sizeof(double));
    args.scratch = scratch.data();
    std::uint64_t arrived = 0;
    args.arrived = &arrived;
    kernels.mlp_meta_step(args, Stream{0, 0, threads, &r.launches});
    check(arrived == 0, c_.name + ": the counter of blocks is not left as it was");
    return r;
  }

  MlpMetaStep kernel_args() const {
    MlpMetaStep args;
    fill(&args);
    args.dtype = fastmaml::DType::kFloat64;
    args.layers = layers_.data();
    args.depth = static_cast<Index>(layers_.size());
    args.theta_size = size_;
    return args;
  }

 private:
  // What both kinds of arguments have.
  template <typename Args>
  void fill(Args* args) const {
    const bool labels = c_.loss == TaskLoss::kCrossEntropy;
    const auto* query_labels = labels_.data() + c_.batches * c_.tasks * c_.support;
    args->theta = theta_.data();
    args->support_x = support_x_.data();
    args->query_x = query_x_.data();
    args->support_y = labels ? static_cast<const void*>(labels_.data()) : support_y_.data();
    args->query_y = labels ? static_cast<const void*>(query_labels) : query_y_.data();
    args->support_examples = c_.support;
    args->support_batches = c_.batches;
    args->query_examples = c_.query;
    args->tasks = c_.tasks;
    args->steps = c_.steps;
    args->loss = c_.loss;
    args->first_order = c_.first_order;
    args->rate = 0.05;
    args->rates = c_.rate_steps > 0 ? rates_.data() : nullptr;
    args->rate_steps = std::max<Index>(c_.rate_steps, 1);
  }

  Results empty() const {
    return {poisoned<double>(c_.tasks),
            poisoned<double>(1),
            poisoned<double>(size_),
            poisoned<double>(c_.rate_steps * size_),
            poisoned<double>(c_.tasks * size_),
            poisoned<double>(c_.tasks * c_.query * c_.widths.back())};
  }

  Case c_;
  ProgramBuilder builder_;
  std::vector<MlpLayer> layers_;
  Index size_ = 0;
  Values theta_, rates_, support_x_, support_y_, query_x_, query_y_;
  std::vector<std::int64_t> labels_;
};

bool same_means(const Results& a, const Results& b) {
  return a.mean_loss == b.mean_loss && a.gtheta == b.gtheta && a.grates == b.grates;
}

// In so many launches.
void check_case(const Case& c, Index launches = 1) {
  const Problem problem(c);
  const Results expected = problem.by_program();
  Results before;
  for (const int threads : {1, 5}) {
    const std::string name = c.name + ", " + std::to_string(threads) + " threads: ";
    const Results got = problem.by_kernel(threads);
    constexpr double kUnits = 1e4;
    check_close(got.losses, expected.losses, kUnits, name + "losses");
    check_close(got.mean_loss, expected.mean_loss, kUnits, name + "their mean");
    check_close(got.predictions, expected.predictions, kUnits, name + "predictions");
    check_close(got.adapted, expected.adapted, kUnits, name + "adapted");
    check_close(got.gtheta, expected.gtheta, kUnits, name + "gradient");
    check_close(got.grates, expected.grates, kUnits, name + "gradient of the rates");
    check(got.launches == launches, name + "launches");
    check(threads == 1 || same_means(got, before), name + "other means than by one thread");
    before = got;
  }
}

void check_cases() {
  const TaskLoss mse = TaskLoss::kMeanSquaredError, labels = TaskLoss::kCrossEntropy;
  check_case({"sine", {1, 40, 40, 1}, "relu", mse, 25, 10, 10, 1, 0});
  check_case({"sine, five steps", {1, 40, 40, 1}, "tanh", mse, 4, 10, 7, 5, 0});
  check_case({"rates", {3, 8, 2}, "softplus", mse, 9, 4, 5, 3, 1});
  check_case({"rates of steps", {3, 8, 2}, "gelu", mse, 9, 4, 5, 3, 3});
  check_case({"labels", {6, 7, 5, 4}, "silu", labels, 5, 8, 3, 2, 1});
  check_case({"first order", {3, 8, 2}, "sin", mse, 9, 4, 5, 3, 0, true});
  check_case({"first order, rates", {3, 8, 2}, "elu", mse, 2, 4, 5, 3, 3, true});
  check_case({"no steps", {3, 8, 2}, "tanh", mse, 3, 4, 5, 0, 1});
  check_case({"one layer", {4, 3}, "", labels, 3, 6, 6, 4, 0});
  check_case({"one example", {1, 1}, "", mse, 1, 1, 1, 2, 1});
  check_case({"output activation", {4, 6, 3}, "sigmoid", mse, 3, 6, 6, 2, 0, false, true});
  check_case({"as much as one block adds up", {31, 32}, "", mse, 48, 2, 1, 1, 0});
  check_case({"more than one block adds up", {31, 32}, "", mse, 49, 2, 1, 1, 0}, 2);
  check_case({"many sums", {5, 61, 53, 3}, "tanh", mse, 9, 3, 2, 2, 1}, 2);
  check_case({"mini-batches", {3, 5, 2}, "tanh", labels, 3, 4, 6, 5, 1, false, false, 2});
  for (const char* function : {"leaky_relu", "selu", "gelu_tanh", "hardtanh", "hardswish", "mish",
                               "log_sigmoid", "abs", "square", "cube", "clamp", "cos"}) {
    check_case({function, {3, 6, 5, 2}, function, mse, 3, 5, 4, 2, 0});
  }
  check_case({"exp", {3, 6, 2}, "exp", mse, 3, 5, 4, 2, 0});
}

// The two ways to take means over tasks, whichever of them a call takes.
template <typename T>
void check_means(Index tasks, Index row, Index theta_size) {
  using fastmaml::emulated::Team;
  using Means = fastmaml::emulated::TaskMeans<T>;
  struct ByOneBlock : Means {
    void operator()(const Team& team, unsigned char* shared) const {
      this->by_one_block(team, shared);
    }
  };
  const std::vector<T> losses = random_values<T>(tasks), rows = random_values<T>(tasks * row);
  const auto means = [&](bool one_block, int threads) {
    std::vector<T> out = poisoned<T>(1 + row);
    const Means body{tasks, losses.data(), out.data(),     rows.data(),
                     row,   theta_size,    out.data() + 1, out.data() + 1 + theta_size};
    const Stream stream{0, 0, threads};
    if (one_block) {
      fastmaml::emulated::launch("", ByOneBlock{body}, 1, Means::kSharedBytes, stream);
    } else {
      const Index blocks = fastmaml::emulated::column_blocks(row);
      fastmaml::emulated::launch("", body, blocks, Means::kSharedBytes, stream);
    }
    return out;
  };
  Values expected(1 + row);
  for (Index task = 0; task < tasks; ++task) {
    expected[0] += losses[task] / tasks;
    for (Index i = 0; i < row; ++i) expected[1 + i] += rows[task * row + i] / double(tasks);
  }
  const std::string name = std::to_string(tasks) + " tasks, " + std::to_string(row) + ": ";
  const std::vector<T> got = means(true, 1);
  check_close(got, expected, 100, name + "means");
  check(got == means(true, 3) && got == means(false, 1) && got == means(false, 3),
        name + "means depend on who takes them");
}

void check_means() {
  for (const Index tasks : {1, 7, 8, 25, 31, 32, 33, 100, 513}) {
    check_means<double>(tasks, 1, 1);
    check_means<float>(tasks, 67, 67);
    check_means<double>(tasks, 132, 33);
  }
}

template <typename Change>
void check_refused(const std::string& expected, Change change) {
  const Problem problem({"", {2, 3, 2}, "relu", TaskLoss::kCrossEntropy, 2, 3, 3, 2, 0});
  MlpMetaStep args = problem.kernel_args();
  change(&args);
  try {
    fastmaml::emulated_kernels()->mlp_meta_step(args, Stream());
    fail("accepted: " + expected);
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).find(expected) != std::string::npos,
          "refused with another reason than " + expected + ": " + error.what());
  }
}

void check_errors() {
  check_refused("theta must not be null", [](MlpMetaStep* a) { a->theta = nullptr; });
  check_refused("support_y", [](MlpMetaStep* a) { a->support_y = nullptr; });
  check_refused("gtheta", [](MlpMetaStep* a) { a->gradient = true; });
  check_refused("depth", [](MlpMetaStep* a) { a->depth = 0; });
  check_refused("rate_steps", [](MlpMetaStep* a) {
    a->rates = a->theta;
    a->rate_steps = 3;
  });
  check_refused("does not fit", [](MlpMetaStep* a) { a->query_examples = 100000; });
  static double out[64];
  check_refused("scratch", [](MlpMetaStep* a) {
    a->gradient = true;
    a->gtheta = out;
  });
  check_refused("arrived", [](MlpMetaStep* a) {
    a->losses = out;
    a->mean_loss = out;
  });
  check_refused("their mean", [](MlpMetaStep* a) { a->mean_loss = out; });
}

// What is out of range is not read, and the loss says so.
void check_labels_out_of_range() {
  const Problem problem({"", {2, 3, 2}, "relu", TaskLoss::kCrossEntropy, 1, 3, 3, 1, 0});
  MlpMetaStep args = problem.kernel_args();
  const std::int64_t labels[] = {0, 2, -100};
  double loss = 0;
  args.query_y = labels;
  args.losses = &loss;
  fastmaml::emulated_kernels()->mlp_meta_step(args, Stream());
  check(std::isnan(loss), "a label out of range has a loss");
}

}  // namespace

int main() {
  check_cases();
  check_means();
  check_errors();
  check_labels_out_of_range();
  return report("cuda_mlp");
}
