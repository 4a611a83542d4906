// The meta-step with a task in each lane.
#include "cpu/program_lanes.h"

#include <algorithm>
#include <set>
#include <utility>

#include "cpu/activation_names.h"

namespace fastmaml {

namespace {

double number(const OpSpec& op, const char* name) {
  const auto found = op.attributes.find(name);
  if (found == op.attributes.end()) return 0;
  const Index* integer = std::get_if<Index>(&found->second);
  return integer != nullptr ? static_cast<double>(*integer) : std::get<double>(found->second);
}

// Each layer's parameters, in theta and nobody else's; false where they are not.
bool add_linear(const ProgramSpec& spec, const OpSpec& op, std::set<int>* used,
                LaneNetwork* network) {
  for (int slot : op.params) {
    if (slot >= 0 && (!spec.slots[slot].adapted || !used->insert(slot).second)) return false;
  }
  const SlotSpec& weight = spec.slots[op.params[0]];
  if (weight.swapped) return false;
  LaneLayer layer;
  layer.in = weight.shape[1];
  layer.out = weight.shape[0];
  layer.weight = weight.offset;
  if (op.params.size() > 1 && op.params[1] >= 0) layer.bias = spec.slots[op.params[1]].offset;
  layer.values = network->widths;
  network->widths += layer.out;
  network->theta_size += layer.out * (layer.in + (layer.bias < 0 ? 0 : 1));
  network->layers.push_back(layer);
  return true;
}

bool add_activation(const OpSpec& op, LaneNetwork* network) {
  if (network->layers.empty() || network->layers.back().active) return false;
  LaneLayer& layer = network->layers.back();
  layer.active = true;
  layer.function = *activation_named(std::get<std::string>(op.attributes.at("function")));
  layer.alpha = number(op, "alpha");
  layer.beta = number(op, "beta");
  return true;
}

}  // namespace

LaneNetwork LaneNetwork::of(const ProgramSpec& spec) {
  LaneNetwork network;
  std::set<int> used;
  int value = 0;  // the input
  for (const OpSpec& op : spec.ops) {
    if (op.inputs != std::vector<int>{value}) return {};
    value = op.output;
    if (op.kind == "view") continue;
    const bool flat = spec.values[op.inputs[0]].size() == 1;
    const bool added = op.kind == "linear"
                           ? flat && add_linear(spec, op, &used, &network)
                           : op.kind == "activation" && add_activation(op, &network);
    if (!added) return {};
  }
  const bool whole = spec.theta_size < 0 || spec.theta_size == network.theta_size;
  if (value != spec.output || spec.values[value].size() != 1 || !whole) return {};
  return network;
}

bool LaneNetwork::suits(Index tasks, Index examples, int lanes, Index element_bytes) const {
  if (layers.empty()) return false;
  // What an adjoint step goes over must stay in a core's cache, and few lanes may be empty.
  constexpr Index kMostBytes = Index{640} << 10;
  const Index per_example = 4 * widths + layers.front().in;
  const Index bytes = (3 * theta_size + per_example * examples) * lanes * element_bytes;
  const Index groups = (tasks + lanes - 1) / lanes;
  return bytes <= kMostBytes && 4 * tasks >= 3 * groups * lanes;
}

template <typename T>
bool LaneMetaStep<T>::takes(const LaneNetwork& network, const Kernels<T>& kernels,
                            const MetaStepArgs& args) {
  const bool plain = args.update == nullptr && args.theta_stride == 0 && args.gshared == nullptr &&
                     args.loss != TaskLoss::kMean;
  const Index examples = std::max(args.support_examples, args.query_examples);
  return plain && network.suits(args.tasks, examples, kernels.lanes, sizeof(T));
}

template <typename T>
LaneMetaStep<T>::LaneMetaStep(const LaneNetwork& network, const Kernels<T>& kernels,
                              ArenaPool& memory, const MetaStepArgs& args)
    : network_(network),
      kernels_(kernels),
      memory_(memory),
      args_(args),
      loss_(kernel_loss(args.loss)),
      lanes_(kernels.lanes),
      size_(network.theta_size),
      groups_((args.tasks + lanes_ - 1) / lanes_),
      threads_(static_cast<int>(std::min<Index>(args.threads, groups_))),
      returns_(args.grates != nullptr || (args.gtheta != nullptr && !args.first_order)),
      first_saved_(returns_ ? std::max<Index>(0, args.steps - affordable_steps()) : args.steps),
      ones_(memory.take<T>(1)) {
  *ones_ = T(1);
  if (args.gtheta != nullptr) theta_sums_ = GroupSums<T>(memory, groups_, size_);
  if (args.grates != nullptr) {
    rates_sums_ = GroupSums<T>(memory, groups_, args.rate_steps * size_);
    rates_sums_.clear();
  }
}

// --- memory -------------------------------------------------------------------------------------

template <typename T>
Index LaneMetaStep<T>::affordable_steps() const {
  const Index elements = kParts * network_.widths * args_.support_examples * lanes_;
  const Index bytes = elements * static_cast<Index>(sizeof(T)) * threads_;
  return std::max<Index>(1,
                         static_cast<Index>(args_.memory_budget_bytes) / std::max<Index>(1, bytes));
}

template <typename T>
std::shared_ptr<T> LaneMetaStep<T>::take_theta() const {
  return memory_.take<T>(size_ * lanes_);
}

template <typename T>
typename LaneMetaStep<T>::Values LaneMetaStep<T>::take_values(Index examples) const {
  return {examples, memory_.take<T>(kParts * network_.widths * examples * lanes_)};
}

template <typename T>
typename LaneMetaStep<T>::Examples LaneMetaStep<T>::take_examples(Index count, bool targets) const {
  const Index outputs = targets ? network_.layers.back().out : 0;
  return {count, memory_.take<T>(count * network_.layers.front().in * lanes_),
          memory_.take<T>(count * outputs * lanes_)};
}

template <typename T>
typename LaneMetaStep<T>::Group LaneMetaStep<T>::take_group() const {
  Group group;
  const bool steps = args_.steps > 0;
  for (Index k = 0; k < (returns_ ? args_.steps : steps); ++k) {
    group.thetas.push_back(take_theta());
  }
  for (Index k = std::min(first_saved_, args_.steps - 1); steps && k < args_.steps; ++k) {
    group.steps.push_back(take_values(args_.support_examples));
  }
  for (Index b = 0; steps && b < args_.support_batches; ++b) {
    group.support.push_back(take_examples(args_.support_examples, true));
  }
  group.losses = memory_.take<T>(lanes_);
  if (args_.query_examples > 0) {
    group.query_examples = take_examples(args_.query_examples, args_.query_y != nullptr);
    group.query = take_values(args_.query_examples);
  }
  if (wants_gradient()) group.adjoint = take_theta();
  if (returns_ && steps) {
    group.tangents = take_values(args_.support_examples);
    if (args_.rates != nullptr) group.direction = take_theta();
    if (args_.grates != nullptr) group.gradient = take_theta();
  }
  return group;
}

// Lanes without a task repeat the last one.
template <typename T>
void LaneMetaStep<T>::transpose_in(const Group& group, Index size, const void* from, Index set,
                                   T* to) const {
  for (Index lane = 0; lane < lanes_; ++lane) {
    const Index task = std::min(group.tasks.begin + lane, group.tasks.end - 1);
    const T* in = static_cast<const T*>(from) + (set * args_.tasks + task) * size;
    for (Index i = 0; i < size; ++i) to[i * lanes_ + lane] = in[i];
  }
}

template <typename T>
void LaneMetaStep<T>::transpose_out(const Group& group, Index size, const T* from, void* to) const {
  for (Index task = group.tasks.begin; task < group.tasks.end; ++task) {
    T* out = static_cast<T*>(to) + task * size;
    for (Index i = 0; i < size; ++i) out[i] = from[i * lanes_ + task - group.tasks.begin];
  }
}

template <typename T>
void LaneMetaStep<T>::load(const Group& group, const Examples& to, const void* x, const void* y,
                           Index set) const {
  const Index outputs = network_.layers.back().out;
  transpose_in(group, to.count * network_.layers.front().in, x, set, to.x.get());
  if (y == nullptr) return;
  if (loss_ != Loss::kCrossEntropy) {
    return transpose_in(group, to.count * outputs, y, set, to.targets.get());
  }
  std::fill_n(to.targets.get(), to.count * outputs * lanes_, T(0));
  for (Index lane = 0; lane < lanes_; ++lane) {
    const Index task = std::min(group.tasks.begin + lane, group.tasks.end - 1);
    const auto* labels =
        static_cast<const std::int64_t*>(y) + (set * args_.tasks + task) * to.count;
    for (Index n = 0; n < to.count; ++n) {
      to.targets.get()[(n * outputs + labels[n]) * lanes_ + lane] = T(1);
    }
  }
}

// --- passes over the layers ---------------------------------------------------------------------

template <typename T>
void LaneMetaStep<T>::forward(Theta theta, const Examples& examples, const Values& v) const {
  const Index n = examples.count;
  for (Index l = 0; l <= last(); ++l) {
    const LaneLayer& layer = network_.layers[l];
    const LaneMatrix<T> x = {input(l, examples, v), layer.in, 1};
    multiply(n, layer.out, {x, transposed(layer, theta), layer.in}, nullptr, bias(layer, theta),
             before(v, l));
    if (!layer.active) continue;
    kernels_.act_forward(layer.function, T(layer.alpha), T(layer.beta), n * layer.out * lanes_,
                         before(v, l), after(v, l), Share{});
  }
}

// From the last layer's gradient to those of all layers.
template <typename T>
void LaneMetaStep<T>::backward(Theta theta, const Values& v) const {
  const Index n = v.examples;
  for (Index l = last(); l >= 0; --l) {
    const LaneLayer& layer = network_.layers[l];
    if (layer.active) {
      kernels_.act_backward(layer.function, T(layer.alpha), T(layer.beta), n * layer.out * lanes_,
                            before(v, l), gradient_after(v, l), gradient_before(v, l), false,
                            Share{});
    }
    if (l == 0) return;
    const LaneMatrix<T> gradient = {gradient_before(v, l), layer.out, 1};
    multiply(n, layer.in, {gradient, weight(layer, theta), layer.out}, nullptr, {},
             gradient_after(v, l - 1));
  }
}

// The gradient of one layer's parameters from `gradient` [n][out] and `x` [n][in]; with its tangent
// from both and both's tangents (dx may be null).
template <typename T>
void LaneMetaStep<T>::layer_parameters(Index l, Index n, const T* gradient, const T* x,
                                       const T* gradient2, const T* x2, const Sink& sink) const {
  const LaneLayer& layer = network_.layers[l];
  const auto rates = [&](Index place) {
    return sink.rates == nullptr ? nullptr : sink.rates + place;
  };
  const LaneProduct<T> first = {{gradient, 1, layer.out}, {x, layer.in, 1}, n};
  const LaneProduct<T> second = {{gradient2, 1, layer.out}, {x2, layer.in, 1}, n};
  kernels_.lane_products({layer.out,
                          layer.in,
                          {first, second},
                          x2 == nullptr ? 1 : 2,
                          weight(layer, sink.base),
                          sink.factor,
                          rates(layer.weight),
                          layer.in,
                          sink.out + layer.weight * lanes_});
  if (layer.bias < 0) return;
  const LaneProduct<T> sum = {{gradient, 1, layer.out}, {ones_.get(), 0, 0, true}, n};
  LaneMatrix<T> base = bias(layer, sink.base);
  std::swap(base.row, base.column);
  kernels_.lane_products({layer.out,
                          1,
                          {sum},
                          1,
                          base,
                          sink.factor,
                          rates(layer.bias),
                          1,
                          sink.out + layer.bias * lanes_});
}

template <typename T>
void LaneMetaStep<T>::parameters(const Examples& examples, const Values& v,
                                 const Sink& sink) const {
  for (Index l = last(); l >= 0; --l) {
    layer_parameters(l, v.examples, gradient_before(v, l), input(l, examples, v), nullptr, nullptr,
                     sink);
  }
}

// Tangents of all layers' outputs along a direction in theta.
template <typename T>
void LaneMetaStep<T>::tangent(Theta theta, const T* direction, const Examples& examples,
                              const Values& v, const Values& dv) const {
  const Index n = v.examples;
  for (Index l = 0; l <= last(); ++l) {
    const LaneLayer& layer = network_.layers[l];
    const LaneMatrix<T> x = {input(l, examples, v), layer.in, 1};
    const LaneProduct<T> by_weights = {x, transposed(layer, {direction}), layer.in};
    if (l == 0) {
      multiply(n, layer.out, by_weights, nullptr, bias(layer, {direction}), before(dv, l));
    } else {
      const LaneProduct<T> by_input = {
          {after(dv, l - 1), layer.in, 1}, transposed(layer, theta), layer.in};
      multiply(n, layer.out, by_weights, &by_input, bias(layer, {direction}), before(dv, l));
    }
    if (!layer.active) continue;
    kernels_.act_tangent(layer.function, T(layer.alpha), T(layer.beta), n * layer.out * lanes_,
                         before(v, l), before(dv, l), after(dv, l), Share{});
  }
}

// The tangent of `backward` and `parameters`. The direction may be where the results go: a layer's
// part of it is read for the last time before that part is written.
template <typename T>
void LaneMetaStep<T>::backward_tangent(Theta theta, const T* direction, const Examples& examples,
                                       const Values& v, const Values& dv, const Sink& sink) const {
  const Index n = v.examples;
  for (Index l = last(); l >= 0; --l) {
    const LaneLayer& layer = network_.layers[l];
    if (layer.active) {
      const T* bend = layer.in_place() ? nullptr : before(dv, l);
      kernels_.act_backward_tangent(
          layer.function, T(layer.alpha), T(layer.beta), n * layer.out * lanes_, before(v, l), bend,
          gradient_after(v, l), gradient_after(dv, l), gradient_before(dv, l), false, Share{});
    }
    const T *gradient = gradient_before(v, l), *dgradient = gradient_before(dv, l);
    if (l > 0) {
      const LaneProduct<T> by_gradient = {
          {dgradient, layer.out, 1}, weight(layer, theta), layer.out};
      const LaneProduct<T> by_weights = {
          {gradient, layer.out, 1}, weight(layer, {direction}), layer.out};
      multiply(n, layer.in, by_gradient, &by_weights, {}, gradient_after(dv, l - 1));
    }
    const T* dx = l == 0 ? nullptr : after(dv, l - 1);
    layer_parameters(l, n, dgradient, input(l, examples, v), gradient, dx, sink);
  }
}

// --- the meta-step ------------------------------------------------------------------------------

// Forward and backward at theta_k.
template <typename T>
void LaneMetaStep<T>::run_step(Group& group, Index k) const {
  const Examples& examples = support(group, k);
  const Values& v = values(group, k);
  forward(theta(group, k), examples, v);
  kernels_.lane_loss_gradient(loss_, examples.count, network_.layers.back().out, after(v, last()),
                              examples.targets.get(), gradient_after(v, last()),
                              group.losses.get());
  backward(theta(group, k), v);
}

template <typename T>
void LaneMetaStep<T>::inner_step(Group& group, Index k) const {
  run_step(group, k);
  parameters(support(group, k), values(group, k),
             {theta(group, k), -static_cast<T>(args_.rate), rates(k), moved(group, k + 1)});
}

template <typename T>
void LaneMetaStep<T>::query(Group& group) const {
  const Examples& examples = group.query_examples;
  const Values& v = group.query;
  const Theta adapted = theta(group, args_.steps);
  const Index outputs = network_.layers.back().out;
  forward(adapted, examples, v);
  if (args_.predictions != nullptr) {
    transpose_out(group, examples.count * outputs, after(v, last()), args_.predictions);
  }
  if (args_.query_y == nullptr) return;
  kernels_.lane_loss_gradient(loss_, examples.count, outputs, after(v, last()),
                              examples.targets.get(), gradient_after(v, last()),
                              group.losses.get());
  if (args_.losses != nullptr) transpose_out(group, 1, group.losses.get(), args_.losses);
  if (!wants_gradient()) return;
  backward(adapted, v);
  parameters(examples, v, {{}, T(1), nullptr, group.adjoint.get()});
}

// d loss / d rates = -rate * lambda_{k+1} * g_k, element by element.
template <typename T>
void LaneMetaStep<T>::add_rates_gradient(Group& group, Index k, Index index) const {
  parameters(support(group, k), values(group, k), {{}, T(1), nullptr, group.gradient.get()});
  T* sums = rates_sums_.row(index) + rate_row(k) * size_;
  kernels_.lane_sums(size_, tasks(group), -static_cast<T>(args_.rate) / static_cast<T>(args_.tasks),
                     group.adjoint.get(), group.gradient.get(), sums, true);
}

// lambda_k = lambda_{k+1} - H_k A_k lambda_{k+1}
template <typename T>
void LaneMetaStep<T>::adjoint_step(Group& group, Index k) const {
  const Examples& examples = support(group, k);
  const Values &v = values(group, k), &dv = group.tangents;
  T* adjoint = group.adjoint.get();
  const T* direction = adjoint;
  T factor = -static_cast<T>(args_.rate);
  if (args_.rates != nullptr) {
    const LaneProduct<T> whole = {{adjoint, 1, 0}, {ones_.get(), 0, 0, true}, 1};
    kernels_.lane_products({size_, 1, {whole}, 1, {}, -factor, rates(k), 1, group.direction.get()});
    direction = group.direction.get();
    factor = T(-1);
  }
  tangent(theta(group, k), direction, examples, v, dv);
  kernels_.lane_loss_tangent(loss_, examples.count, network_.layers.back().out, after(v, last()),
                             after(dv, last()), gradient_after(dv, last()));
  backward_tangent(theta(group, k), direction, examples, v, dv,
                   {{adjoint, false}, factor, nullptr, adjoint});
}

template <typename T>
void LaneMetaStep<T>::store_adapted(const Group& group) const {
  if (args_.steps > 0) {
    return transpose_out(group, size_, moved(group, args_.steps), args_.adapted);
  }
  for (Index task = group.tasks.begin; task < group.tasks.end; ++task) {
    std::copy_n(static_cast<const T*>(args_.theta), size_,
                static_cast<T*>(args_.adapted) + task * size_);
  }
}

template <typename T>
void LaneMetaStep<T>::run_group(Group& group, Index index) const {
  for (Index b = 0; b < static_cast<Index>(group.support.size()); ++b) {
    load(group, group.support[b], args_.support_x, args_.support_y, b);
  }
  for (Index k = 0; k < args_.steps; ++k) inner_step(group, k);
  if (args_.adapted != nullptr) store_adapted(group);
  if (args_.query_examples == 0) return;
  load(group, group.query_examples, args_.query_x, args_.query_y, 0);
  query(group);
  for (Index k = args_.steps - 1; returns_ && k >= 0; --k) {
    if (k < first_saved_) run_step(group, k);
    if (args_.grates != nullptr) add_rates_gradient(group, k, index);
    if (!args_.first_order) adjoint_step(group, k);
  }
  if (args_.gtheta == nullptr) return;
  kernels_.lane_sums(size_, tasks(group), T(1) / static_cast<T>(args_.tasks), group.adjoint.get(),
                     nullptr, theta_sums_.row(index), false);
}

template <typename T>
void LaneMetaStep<T>::store_sum(const GroupSums<T>& sums, Index size, void* out) const {
  if (out != nullptr) std::copy_n(sums.total(kernels_, 1), size, static_cast<T*>(out));
}

template <typename T>
void LaneMetaStep<T>::run() {
  std::vector<Group> groups(team_count(groups_, threads_));
  for (Group& group : groups) group = take_group();
  for_each_unit(groups_, threads_, [&](const TeamMember& member, Index index) {
    Group& group = groups[member.team];
    group.tasks = split(args_.tasks, Share{static_cast<int>(index), static_cast<int>(groups_)});
    run_group(group, index);
  });
  store_sum(theta_sums_, size_, args_.gtheta);
  store_sum(rates_sums_, args_.rate_steps * size_, args_.grates);
}

template class LaneMetaStep<float>;
template class LaneMetaStep<double>;

}  // namespace fastmaml
