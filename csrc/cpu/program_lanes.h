// Meta-steps of small networks: a vector holds the same element of as many tasks as it has lanes.
//
// One task of a chain of narrow layers fills no tile: its few examples and its odd widths are
// padded, and between two products there is little but overhead. With a task in each lane nothing
// is padded, layers of one unit included, and every product runs for all lanes at once. The price
// is memory: all parameters, times the lanes.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/program_memory.h"
#include "cpu/thread_pool.h"
#include "fastmaml/core.h"

namespace fastmaml {

// As the kernels call it.
inline Loss kernel_loss(TaskLoss loss) {
  switch (loss) {
    case TaskLoss::kCrossEntropy:
      return Loss::kCrossEntropy;
    case TaskLoss::kMeanSquaredError:
      return Loss::kMeanSquaredError;
    default:
      return Loss::kMean;
  }
}

// y = f(W x + b); weight and bias are places in theta.
struct LaneLayer {
  Index in = 0, out = 0;
  Index weight = 0, bias = -1;  // no bias: -1
  Index values = 0;             // outputs of all layers before
  bool active = false;
  Activation function = Activation::kRelu;
  double alpha = 0, beta = 0;

  // What the activation gives tells as much as what it takes, and its slope does not bend.
  bool in_place() const { return !active || function == Activation::kRelu; }
};

struct LaneNetwork {
  std::vector<LaneLayer> layers;  // none: no network of this kind
  Index theta_size = 0, widths = 0;

  // A chain of linear layers and activations whose parameters are all adapted and fill theta.
  static LaneNetwork of(const ProgramSpec& spec);
  // Whether this is the faster way for so many tasks, of at most so many examples.
  bool suits(Index tasks, Index examples, int lanes, Index element_bytes) const;
};

template <typename T>
class LaneMetaStep {
 public:
  // Whether this is the way for `args`.
  static bool takes(const LaneNetwork& network, const Kernels<T>& kernels,
                    const MetaStepArgs& args);

  LaneMetaStep(const LaneNetwork& network, const Kernels<T>& kernels, ArenaPool& memory,
               const MetaStepArgs& args);
  void run();

 private:
  // Of every layer, before and after its activation: the outputs and the gradients with respect to
  // them; or the tangents of all these. [examples][out][lanes] each.
  struct Values {
    Index examples = 0;
    std::shared_ptr<T> memory;
  };
  struct Examples {
    Index count = 0;
    std::shared_ptr<T> x, targets;
  };

  // What a thread works in, one group of tasks after the other.
  struct Group {
    Range tasks = {0, 0};
    std::vector<std::shared_ptr<T>> thetas;  // theta_1 ... theta_K, or the one that moves
    std::vector<Values> steps;
    std::vector<Examples> support;
    Examples query_examples;
    Values query, tangents;
    std::shared_ptr<T> adjoint, direction, gradient, losses;
  };

  // All tasks' parameters: one copy in each lane, or one for all of them.
  struct Theta {
    const T* at = nullptr;
    bool shared = false;
  };

  // Where a gradient with respect to theta goes: out = base + factor * rates * gradient.
  struct Sink {
    Theta base;
    T factor;
    const T* rates;
    T* out;
  };

  static constexpr Index kParts = 4;  // of Values

  Index affordable_steps() const;
  Group take_group() const;
  Values take_values(Index examples) const;
  Examples take_examples(Index count, bool targets) const;
  std::shared_ptr<T> take_theta() const;

  void run_group(Group& group, Index index) const;
  void load(const Group& group, const Examples& to, const void* x, const void* y, Index set) const;
  void transpose_in(const Group& group, Index size, const void* from, Index set, T* to) const;
  void transpose_out(const Group& group, Index size, const T* from, void* to) const;
  void run_step(Group& group, Index k) const;
  void inner_step(Group& group, Index k) const;
  void query(Group& group) const;
  void store_adapted(const Group& group) const;
  void add_rates_gradient(Group& group, Index k, Index index) const;
  void adjoint_step(Group& group, Index k) const;
  void store_sum(const GroupSums<T>& sums, Index size, void* out) const;

  void forward(Theta theta, const Examples& examples, const Values& v) const;
  void backward(Theta theta, const Values& v) const;
  void layer_parameters(Index l, Index n, const T* gradient, const T* x, const T* gradient2,
                        const T* x2, const Sink& sink) const;
  void parameters(const Examples& examples, const Values& v, const Sink& sink) const;
  void tangent(Theta theta, const T* direction, const Examples& examples, const Values& v,
               const Values& dv) const;
  void backward_tangent(Theta theta, const T* direction, const Examples& examples, const Values& v,
                        const Values& dv, const Sink& sink) const;

  // out = base + the product, or both products.
  void multiply(Index rows, Index columns, const LaneProduct<T>& first,
                const LaneProduct<T>* second, const LaneMatrix<T>& base, T* out) const {
    kernels_.lane_products({rows,
                            columns,
                            {first, second == nullptr ? first : *second},
                            second == nullptr ? 1 : 2,
                            base,
                            T(1),
                            nullptr,
                            0,
                            out});
  }
  // Of theta [size]: an element, and the matrices of a layer.
  const T* place(const Theta& theta, Index index) const {
    return theta.at == nullptr ? nullptr : theta.at + index * (theta.shared ? 1 : lanes_);
  }
  LaneMatrix<T> weight(const LaneLayer& layer, const Theta& theta) const {
    return {place(theta, layer.weight), layer.in, 1, theta.shared};
  }
  LaneMatrix<T> transposed(const LaneLayer& layer, const Theta& theta) const {
    return {place(theta, layer.weight), 1, layer.in, theta.shared};
  }
  LaneMatrix<T> bias(const LaneLayer& layer, const Theta& theta) const {
    return {layer.bias < 0 ? nullptr : place(theta, layer.bias), 0, 1, theta.shared};
  }

  const T* input(Index l, const Examples& examples, const Values& v) const {
    return l == 0 ? examples.x.get() : after(v, l - 1);
  }
  T* part(const Values& v, int which, Index l) const {
    return v.memory.get() +
           (which * network_.widths + network_.layers[l].values) * v.examples * lanes_;
  }
  T* after(const Values& v, Index l) const { return part(v, 0, l); }
  T* before(const Values& v, Index l) const {
    return part(v, network_.layers[l].in_place() ? 0 : 1, l);
  }
  T* gradient_before(const Values& v, Index l) const { return part(v, 2, l); }
  T* gradient_after(const Values& v, Index l) const {
    return part(v, network_.layers[l].in_place() ? 2 : 3, l);
  }
  int tasks(const Group& group) const {
    return static_cast<int>(group.tasks.end - group.tasks.begin);
  }
  Index last() const { return static_cast<Index>(network_.layers.size()) - 1; }

  Examples& support(Group& group, Index k) const {
    return group.support[k % args_.support_batches];
  }
  Values& values(Group& group, Index k) const {
    return group.steps[std::max<Index>(0, k - first_saved_)];
  }
  T* moved(const Group& group, Index k) const { return group.thetas[returns_ ? k - 1 : 0].get(); }
  Theta theta(const Group& group, Index k) const {
    if (k == 0) return {static_cast<const T*>(args_.theta), true};
    return {moved(group, k), false};
  }
  const T* rates(Index k) const {
    return args_.rates == nullptr ? nullptr
                                  : static_cast<const T*>(args_.rates) + rate_row(k) * size_;
  }
  Index rate_row(Index k) const { return args_.rate_steps == 1 ? 0 : k; }
  bool wants_gradient() const { return args_.gtheta != nullptr || args_.grates != nullptr; }

  const LaneNetwork& network_;
  const Kernels<T>& kernels_;
  ArenaPool& memory_;
  const MetaStepArgs& args_;
  const Loss loss_;
  const Index lanes_, size_, groups_;
  const int threads_;
  const bool returns_;       // over the inner steps, for the adjoint
  const Index first_saved_;  // steps before it run a second time
  std::shared_ptr<T> ones_;
  GroupSums<T> theta_sums_, rates_sums_;
};

}  // namespace fastmaml
