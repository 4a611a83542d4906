#include "cpu/program_op.h"

#include <algorithm>

namespace fastmaml {

template <typename T>
BatchPlan<T>::BatchPlan(const Plan<T>& plan, Index examples)
    : examples(examples),
      value(plan.storages.size()),
      gradient(plan.storages.size()),
      tangent(plan.storages.size()),
      ops(plan.ops.size()) {
  const auto place_gradients = [&](bool of_parameters, bool giving_way, Index& size) {
    for (std::size_t i = 0; i < plan.storages.size(); ++i) {
      const Storage& storage = plan.storages[i];
      if (((storage.depends & (kTheta | kPhi)) != 0) != of_parameters) continue;
      if (storage.gives_way != giving_way) continue;
      gradient[i] = take(size, examples * storage.gradient_size);
    }
  };
  for (std::size_t i = 0; i < plan.storages.size(); ++i) {
    value[i] = reserve_value(examples * plan.storages[i].size);
    tangent[i] = reserve_tangent(examples * plan.storages[i].size);
  }
  place_gradients(true, false, least_gradient_size);
  for (const auto& op : plan.ops) op->reserve(*plan.kernels, *this, ops[op->index]);
  gradient_size = least_gradient_size;
  place_gradients(true, true, gradient_size);
  gradient_size_with_input = gradient_size;
  place_gradients(false, false, gradient_size_with_input);
  place_gradients(false, true, gradient_size_with_input);
}

namespace {

// Parameters that no gradient reached have gradient zero.
template <typename T>
void fill_missing(Run<T>& run, Flow<T>& flow) {
  for (std::size_t slot = 0; slot < run.plan.slots.size(); ++slot) {
    if (flow.slot_written[slot]) continue;
    const Target<T> target = run.into_slot(flow, static_cast<int>(slot));
    if (!target) continue;
    const Range part = split(run.plan.slots[slot].packed_size, run.share);
    std::fill(target.data + part.begin, target.data + part.end, T(0));
  }
  run.sync();
}

}  // namespace

template <typename T>
void run_forward(Run<T>& run) {
  for (const auto& op : run.plan.ops) {
    op->forward(run);
    run.sync();
  }
}

template <typename T>
void run_backward(Run<T>& run, Flow<T>& flow) {
  for (auto op = run.plan.ops.rbegin(); op != run.plan.ops.rend(); ++op) {
    if (!run.wanted(flow, (*op)->output) || run.arrived(flow, (*op)->output) == nullptr) continue;
    (*op)->backward(run, flow);
    run.sync();
  }
  fill_missing(run, flow);
}

template <typename T>
void run_tangent(Run<T>& run) {
  for (const auto& op : run.plan.ops) {
    if (!run.has_tangent(op->output)) continue;
    op->tangent(run);
    run.sync();
  }
}

template <typename T>
void run_backward_tangent(Run<T>& run) {
  for (auto op = run.plan.ops.rbegin(); op != run.plan.ops.rend(); ++op) {
    const int output = (*op)->output;
    if (!run.plan.storages[output].live || !run.wanted(run.second, output)) continue;
    if (run.has_tangent(output)) {
      (*op)->backward_tangent(run);
    } else if (run.arrived(run.second, output) != nullptr) {
      (*op)->backward(run, run.second);
    } else {
      continue;
    }
    run.sync();
  }
  fill_missing(run, run.second);
}

#define FASTMAML_INSTANTIATE(T)                     \
  template struct BatchPlan<T>;                     \
  template void run_forward<T>(Run<T>&);            \
  template void run_backward<T>(Run<T>&, Flow<T>&); \
  template void run_tangent<T>(Run<T>&);            \
  template void run_backward_tangent<T>(Run<T>&);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)
#undef FASTMAML_INSTANTIATE

}  // namespace fastmaml
