// A whole meta-step of a small multi-layer perceptron: one block runs a task's inner loop and its
// exact adjoint in shared memory (fastmaml/program/README.md has the maths), and the last block to
// finish takes the means over tasks. theta_k of every inner step goes to scratch memory; a step's
// activations are computed again in its adjoint, together with their tangents.
#include <algorithm>

#include "cuda/mlp.h"
#include "cuda/mlp_network.h"
#include "cuda/task_means.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

namespace {

constexpr const char* kName = "mlp_meta_step";
// Bytes of the tasks' gradients that one block adds up; more are left to many blocks of a second
// launch. An estimate: what a block reads from the L2 cache in the few microseconds of a launch.
constexpr Index kMostForOneBlock = Index{384} << 10;

// Where a call's pieces lie in its scratch memory, in elements.
struct Scratch {
  Index steps;  // [tasks, steps, places]: theta before each inner step
  Index rows;   // [tasks, row]: gradients of theta, then of the rates
  Index row, total;
};

bool keeps_steps(const MlpMetaStep& args) {
  return args.gradient && (!args.first_order || args.rates_gradient);
}

Scratch scratch_of(const MlpMetaStep& args, const Network& network) {
  const Index steps = keeps_steps(args) ? args.tasks * args.steps * network.places : 0;
  const Index rates = args.rates_gradient ? args.rate_steps : 0;
  const Index row = args.gradient ? (1 + rates) * args.theta_size : 0;
  return {0, steps, row, steps + args.tasks * row};
}

Index element_size(const MlpMetaStep& args) {
  return args.dtype == DType::kFloat32 ? sizeof(float) : sizeof(double);
}

bool sums_apart(const MlpMetaStep& args, const Scratch& scratch) {
  return args.tasks * scratch.row * element_size(args) > kMostForOneBlock;
}

// Of the team's own memory.
Index shared_bytes_of(const MlpMetaStep& args, const Network& network) {
  const Index most = std::max(args.support_examples, args.query_examples);
  const Index elements =
      3 * Index{network.places} + most * (network.layers[0].in + 6 * Index{network.widths} + 1);
  return std::max<Index>(elements * element_size(args), TaskMeans<double>::kSharedBytes);
}

template <typename T>
struct MetaStepOfTask {
  static constexpr int kThreads = 256;

  MlpMetaStep args;
  Network network;
  Scratch scratch;
  TaskMeans<T> means;
  int most_examples;
  bool keeps_steps, takes_means;

  FASTMAML_TEAM void operator()(const Team& team, unsigned char* shared) const {
    Run run(*this, team, reinterpret_cast<T*>(shared));
    run.start();
    for (Index k = 0; k < args.steps; ++k) run.inner_step(k);
    run.write_adapted();
    if (args.query_x == nullptr) return;
    run.query();
    if (args.gradient) {
      for (Index k = args.steps - 1; k >= 0 && keeps_steps; --k) run.adjoint_step(k);
      run.write_gradient();
    }
    if (takes_means && team.is_last_block(reinterpret_cast<unsigned long long*>(args.arrived))) {
      means.by_one_block(team, shared);
    }
  }

 private:
  // One task on its way through the inner loop and back.
  class Run {
   public:
    FASTMAML_TEAM Run(const MetaStepOfTask& self, const Team& team, T* memory)
        : self_(self),
          args_(self.args),
          network_(self.network),
          team_(team),
          task_(team.block()),
          theta_(memory),
          lambda_(memory + self.network.places),
          direction_(memory + 2 * self.network.places),
          x_(memory + 3 * self.network.places),
          losses_(x_ + self.most_examples * self.network.layers[0].in) {
      T* values = losses_ + self.most_examples;
      const int each = self.most_examples * self.network.widths;
      values_ = {
          values,           values + each, values + 2 * each, values + 3 * each, values + 4 * each,
          values + 5 * each};
    }

    FASTMAML_TEAM void start() {
      const T* theta = static_cast<const T*>(args_.theta);
      for (int i = team_.rank(); i < network_.places; i += team_.size()) theta_[i] = 0;
      team_.sync();
      network_.for_each_parameter(team_,
                                  [&](int place, int index) { theta_[place] = theta[index]; });
      if (!args_.rates_gradient || args_.steps > 0) return;
      for (Index i = args_.theta_size + team_.rank(); i < self_.scratch.row; i += team_.size()) {
        row()[i] = 0;
      }
    }

    FASTMAML_TEAM void inner_step(Index k) {
      const Examples<T> examples = support(k);
      if (self_.keeps_steps) {
        for (int i = team_.rank(); i < network_.places; i += team_.size()) {
          before(k)[i] = theta_[i];
        }
      }
      network_.template forward<false>(team_, theta_, theta_, examples, values_);
      network_.template loss_gradient<false>(team_, examples, values_, static_cast<T*>(nullptr));
      network_.template backward<false>(
          team_, theta_, theta_, examples, values_,
          [&](int place, int index, T gradient, T) { theta_[place] -= rate(k, index) * gradient; });
      team_.sync();
    }

    FASTMAML_TEAM void write_adapted() {
      if (args_.adapted == nullptr) return;
      T* adapted = static_cast<T*>(args_.adapted) + task_ * args_.theta_size;
      network_.for_each_parameter(team_,
                                  [&](int place, int index) { adapted[index] = theta_[place]; });
    }

    // The loss, and lambda = its gradient at the adapted parameters.
    FASTMAML_TEAM void query() {
      const Examples<T> examples = load(args_.query_x, args_.query_y, task_, args_.query_examples);
      network_.template forward<false>(team_, theta_, theta_, examples, values_);
      write_predictions(examples.count);
      if (args_.query_y == nullptr) return;
      network_.template loss_gradient<false>(team_, examples, values_, losses_);
      if (team_.rank() == 0 && args_.losses != nullptr) {
        T sum = 0;
        for (int n = 0; n < examples.count; ++n) sum += losses_[n];
        static_cast<T*>(args_.losses)[task_] = sum;
      }
      if (!args_.gradient) return;
      network_.template backward<false>(team_, theta_, theta_, examples, values_,
                                        [&](int place, int index, T gradient, T) {
                                          lambda_[place] = gradient;
                                          aim(args_.steps - 1, place, index);
                                        });
      team_.sync();
    }

    // lambda <- lambda - H_k A lambda, and the gradient of the step's rates.
    FASTMAML_TEAM void adjoint_step(Index k) {
      const Examples<T> examples = support(k);
      for (int i = team_.rank(); i < network_.places; i += team_.size()) theta_[i] = before(k)[i];
      team_.sync();
      network_.template forward<true>(team_, theta_, direction_, examples, values_);
      network_.template loss_gradient<true>(team_, examples, values_, static_cast<T*>(nullptr));
      network_.template backward<true>(team_, theta_, direction_, examples, values_,
                                       [&](int place, int index, T gradient, T along) {
                                         add_to_rates(k, index, lambda_[place] * gradient);
                                         lambda_[place] -= along;
                                         aim(k - 1, place, index);
                                       });
      team_.sync();
    }

    FASTMAML_TEAM void write_gradient() {
      network_.for_each_parameter(team_,
                                  [&](int place, int index) { row()[index] = lambda_[place]; });
    }

   private:
    FASTMAML_TEAM Index rate_row(Index k) const { return args_.rate_steps > 1 ? k : 0; }

    FASTMAML_TEAM T rate(Index k, int index) const {
      if (args_.rates == nullptr) return static_cast<T>(args_.rate);
      return static_cast<T>(args_.rate) *
             static_cast<const T*>(args_.rates)[rate_row(k) * args_.theta_size + index];
    }

    // The direction for the adjoint of step k.
    FASTMAML_TEAM void aim(Index k, int place, int index) const {
      if (k < 0) return;
      direction_[place] = args_.first_order ? T(0) : rate(k, index) * lambda_[place];
    }

    // Steps come last to first; an element of the row is always the same thread's.
    FASTMAML_TEAM void add_to_rates(Index k, int index, T product) const {
      if (!args_.rates_gradient) return;
      T* total = row() + (1 + rate_row(k)) * args_.theta_size + index;
      const bool first = args_.rate_steps > 1 || k == args_.steps - 1;
      *total = (first ? T(0) : *total) - static_cast<T>(args_.rate) * product;
    }

    FASTMAML_TEAM Examples<T> support(Index k) {
      const Index place = k % args_.support_batches * args_.tasks + task_;
      return load(args_.support_x, args_.support_y, place, args_.support_examples);
    }

    // A block of examples, read into shared memory unless it is there. No sync.
    FASTMAML_TEAM Examples<T> load(const void* x, const void* targets, Index place, Index count) {
      const Index elements = count * network_.layers[0].in;
      const T* from = static_cast<const T*>(x) + place * elements;
      for (Index i = team_.rank(); from != loaded_ && i < elements; i += team_.size()) {
        x_[i] = from[i];
      }
      loaded_ = from;
      const Index width = network_.last().out;
      const void* own = nullptr;
      if (targets != nullptr && network_.loss == TaskLoss::kCrossEntropy) {
        own = static_cast<const Index*>(targets) + place * count;
      } else if (targets != nullptr) {
        own = static_cast<const T*>(targets) + place * count * width;
      }
      team_.sync();
      return {x_, own, static_cast<int>(count)};
    }

    FASTMAML_TEAM void write_predictions(int count) const {
      if (args_.predictions == nullptr) return;
      const int width = network_.last().out;
      const T* y = values_.post + network_.last().values * count;
      T* predictions = static_cast<T*>(args_.predictions) + task_ * count * width;
      for (int i = team_.rank(); i < count * width; i += team_.size()) predictions[i] = y[i];
    }

    FASTMAML_TEAM T* before(Index k) const {
      return static_cast<T*>(args_.scratch) + self_.scratch.steps +
             (task_ * args_.steps + k) * network_.places;
    }
    FASTMAML_TEAM T* row() const {
      return static_cast<T*>(args_.scratch) + self_.scratch.rows + task_ * self_.scratch.row;
    }

    const MetaStepOfTask& self_;
    const MlpMetaStep& args_;
    const Network& network_;
    const Team& team_;
    const Index task_;
    T *theta_, *lambda_, *direction_, *x_, *losses_;
    const T* loaded_ = nullptr;
    Values<T> values_;
  };
};

Network network_of(const MlpMetaStep& args) {
  Network network{};
  require(args.depth >= 1 && args.depth <= Network::kMostLayers, kName,
          "depth must be from 1 to 12");
  network.depth = static_cast<int>(args.depth);
  network.loss = args.loss;
  Index places = 0, widths = 0;
  for (int l = 0; l < network.depth; ++l) {
    const MlpLayer& layer = args.layers[l];
    require(layer.in > 0 && layer.out > 0, kName, "a layer must have inputs and outputs");
    require(l == 0 || layer.in == args.layers[l - 1].out, kName,
            "a layer must have as many inputs as the one before has outputs");
    require(std::max(layer.in, layer.out) < 1 << 15, kName, "a layer must be narrower than 2**15");
    const Index row = layer.in | 1;
    network.layers[l] = {static_cast<int>(layer.in),
                         static_cast<int>(layer.out),
                         static_cast<int>(row),
                         static_cast<int>(places),
                         layer.bias < 0 ? -1 : static_cast<int>(places + layer.out * row),
                         static_cast<int>(layer.weight),
                         static_cast<int>(layer.bias),
                         static_cast<int>(widths),
                         layer.activation,
                         layer.alpha,
                         layer.beta};
    places += layer.out * (row + (layer.bias < 0 ? 0 : 1));
    widths += layer.out;
    require(places < 1 << 30, kName, "the network is too large");
  }
  network.places = static_cast<int>(places);
  network.widths = static_cast<int>(widths);
  return network;
}

void check(const MlpMetaStep& args, Index shared_bytes, int device) {
  const bool query = args.query_x != nullptr, targets = query && args.query_y != nullptr;
  require(args.theta != nullptr && args.theta_size > 0, kName, "theta must not be null or empty");
  require(args.tasks > 0 && args.tasks < Index{1} << 31, kName, "tasks must be at least 1");
  require(args.steps >= 0, kName, "steps must not be negative");
  require(args.support_batches >= 1, kName, "support_batches must be at least 1");
  require(args.steps == 0 ||
              (args.support_x != nullptr && args.support_y != nullptr && args.support_examples > 0),
          kName, "support_x and support_y must not be null or empty");
  require(!query || args.query_examples > 0, kName, "query_x must not be empty");
  require(!args.gradient || (targets && args.gtheta != nullptr), kName,
          "query_x, query_y and gtheta must not be null where a gradient is wanted");
  require(
      !args.rates_gradient || (args.gradient && args.rates != nullptr && args.grates != nullptr),
      kName, "rates, gtheta and grates must not be null where the rates' gradient is wanted");
  require(args.rates == nullptr || args.rate_steps == 1 || args.rate_steps == args.steps, kName,
          "rate_steps must be 1 or steps");
  require(args.scratch != nullptr || mlp_scratch_bytes(args) == 0, kName,
          "scratch must not be null");
  require(args.mean_loss == nullptr || (targets && args.losses != nullptr), kName,
          "query_x, query_y and losses must not be null where their mean is wanted");
  require(args.arrived != nullptr || (!args.gradient && args.mean_loss == nullptr), kName,
          "arrived must not be null where means over tasks are wanted");
  require(shared_bytes <= shared_memory_limit(device), kName,
          "the network does not fit into a block's shared memory");
}

template <typename T>
void run_as(const MlpMetaStep& args, const Network& network, const Stream& stream) {
  const Scratch scratch = scratch_of(args, network);
  const TaskMeans<T> means{args.tasks,
                           static_cast<const T*>(args.losses),
                           static_cast<T*>(args.mean_loss),
                           static_cast<const T*>(args.scratch) + scratch.rows,
                           scratch.row,
                           args.theta_size,
                           static_cast<T*>(args.gtheta),
                           static_cast<T*>(args.grates)};
  const int most = static_cast<int>(std::max(args.support_examples, args.query_examples));
  const bool any = args.gradient || args.mean_loss != nullptr, apart = sums_apart(args, scratch);
  launch(kName,
         MetaStepOfTask<T>{args, network, scratch, means, most, keeps_steps(args), any && !apart},
         args.tasks, static_cast<std::size_t>(shared_bytes_of(args, network)), stream);
  if (apart) launch(kName, means, column_blocks(scratch.row), means.kSharedBytes, stream);
}

}  // namespace

Index mlp_shared_bytes(const MlpMetaStep& args) { return shared_bytes_of(args, network_of(args)); }

Index mlp_scratch_bytes(const MlpMetaStep& args) {
  return scratch_of(args, network_of(args)).total * element_size(args);
}

void mlp_meta_step(const MlpMetaStep& args, const Stream& stream) {
  const Network network = network_of(args);
  check(args, mlp_shared_bytes(args), stream.device);
  if (args.dtype == DType::kFloat32) return run_as<float>(args, network, stream);
  run_as<double>(args, network, stream);
}

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
