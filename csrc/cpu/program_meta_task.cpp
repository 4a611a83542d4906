// The meta-step of one task: the inner loop, the query loss, and back.
#include "cpu/program_meta.h"

namespace fastmaml {

template <typename T>
void MetaStep<T>::run_task(Member& member) const {
  member.loaded = -1;
  std::fill(member.factors.adjoint_rows.begin(), member.factors.adjoint_rows.end(), 0);
  if (args_.query_examples > 0) {
    load(member.query, args_.query_x, member.task, member.work->query_input.get());
  }
  for (Index k = 0; k < args_.steps; ++k) inner_step(member, k);
  if (args_.adapted != nullptr) {
    auto* out = static_cast<T*>(args_.adapted) + member.task * plan_.theta.size();
    plan_.theta.unpack(theta_at(member, args_.steps), T(1), out, member.support.share);
    member.support.sync();
    if (member.support.share.part == 0) {
      plan_.theta.copy_uncovered(
          static_cast<const T*>(args_.theta) + member.task * args_.theta_stride, out);
    }
  }
  if (args_.query_examples > 0) query(member);
  if (!wants_gradient()) return;
  const bool second_order = !args_.first_order;
  for (Index k = args_.steps - 1; k >= 0; --k) {
    if (k < first_saved_ && (second_order || keeps_gradients())) replay(member, k);
    if (args_.grates != nullptr) add_rates_gradient(member, k);
    if (updates_) {
      Workspace& work = *member.work;
      updates_->adjoint(member.support, work.inner, k, member.group, theta_at(member, k),
                        step_gradient(member, k), work.adjoint.get(), work.direction.get());
    }
    if (second_order) adjoint_step(member, k);
  }
  finish_task(member, second_order && args_.steps > 0);
}

// Points a run at one set of examples.
template <typename T>
void MetaStep<T>::load(Run<T>& run, const void* x, Index set, T* converted) const {
  const T* from = static_cast<const T*>(x) + set * run.examples() * plan_.input_size;
  run.input = converted == nullptr ? from : converted;
  run.buffers = buffers_.get();
  if (converted != nullptr) load_input(run, from, converted);
}

// Points the support run at step k.
template <typename T>
void MetaStep<T>::bind(Member& member, Index k) const {
  Run<T>& run = member.support;
  const Index set = support_set(member, k);
  if (member.loaded != set) load(run, args_.support_x, set, member.work->support_input.get());
  member.loaded = set;
  const StepMemory& memory = step_memory(*member.work, k);
  run.values = memory.values.get();
  run.weights = start_.of(member.task);
  run.weights.theta = theta_at(member, k);
  if (own_theta(k)) run.weights.theta_transposed = memory.transposed.get();
  factored_->bind(member.factors, run.member.team, member.task, k);
  run.first.region = memory.gradients.get();
  run.first.sources = kTheta;
  run.first.theta = step_gradient(member, k);
}

template <typename T>
T MetaStep<T>::loss(Run<T>& run, const void* targets, Index set) const {
  const Index rows = run.examples() * plan_.output_rows;
  const Index offset = set * rows * plan_.output_columns;
  T* gy = begin_flow(run, run.first);
  T value = 0;
  if (run.share.part == 0) {
    const std::int64_t* labels = nullptr;
    const T* values = nullptr;
    if (loss_ == Loss::kCrossEntropy)
      labels = static_cast<const std::int64_t*>(targets) + set * rows;
    if (loss_ == Loss::kMeanSquaredError) values = static_cast<const T*>(targets) + offset;
    value = kernels_.loss_gradient(loss_, rows, plan_.output_columns, run.value(plan_.output),
                                   labels, values, gy);
  }
  run.sync();
  return value;
}

// Forward and backward at theta_k.
template <typename T>
void MetaStep<T>::replay(Member& member, Index k) const {
  bind(member, k);
  Run<T>& run = member.support;
  if (own_theta(k)) {
    plan_.theta.transpose(kernels_, theta_at(member, k), outer_,
                          step_memory(*member.work, k).transposed.get(), run.share,
                          factored_->offsets());
    run.sync();
  }
  run_forward(run);
  loss(run, args_.support_y, support_set(member, k));
  run_backward(run, run.first);
}

template <typename T>
void MetaStep<T>::inner_step(Member& member, Index k) const {
  replay(member, k);
  Run<T>& run = member.support;
  store_stats(run, stats_row(member.task, k));
  T* next = member.work->thetas[k].get();
  const T *theta = theta_at(member, k), *gradient = step_gradient(member, k);
  if (updates_) {
    updates_->step(run, member.work->inner, k, theta, gradient, next);
  } else {
    const T* rates = rates_at(k);
    for_others([&](Index at, Index count) {
      kernels_.update(count, -rate_, rates == nullptr ? nullptr : rates + at, theta + at,
                      gradient + at, next + at, run.share);
    });
  }
  factored_->add_step(run, k, -rate_);
  run.sync();
}

template <typename T>
void MetaStep<T>::query(Member& member) const {
  Run<T>& run = member.query;
  Workspace& work = *member.work;
  run.values = work.query.values.get();
  run.weights = start_.of(member.task);
  run.weights.theta = theta_at(member, args_.steps);
  if (own_theta(args_.steps)) run.weights.theta_transposed = work.query.transposed.get();
  factored_->bind(member.factors, run.member.team, member.task, args_.steps);
  run_forward(run);
  store_stats(run, stats_row(member.task, args_.steps));
  if (args_.predictions != nullptr) {
    store_output(run, run.value(plan_.output),
                 static_cast<T*>(args_.predictions) +
                     member.task * args_.query_examples * plan_.output_size);
  }
  if (args_.query_y == nullptr) return;
  run.first.region = work.query.gradients.get();
  run.first.over_values = true;  // nobody reads them again
  const T value = loss(run, args_.query_y, member.task);
  if (args_.losses != nullptr && run.share.part == 0) {
    static_cast<T*>(args_.losses)[member.task] = value;
  }
  if (!wants_gradient()) return;
  if (own_theta(args_.steps)) {
    plan_.theta.transpose(kernels_, run.weights.theta, outer_, work.query.transposed.get(),
                          run.share, factored_->offsets());
    run.sync();
  }
  run.first.sources = outer_;
  run.first.theta = work.adjoint.get();
  run.first.phi = work.phi.get();
  run_backward(run, run.first);
  factored_->add_adjoint(run, run.first, member.factors, member.task, T(1));
  if ((outer_ & kPhi) != 0) {
    kernels_.axpby(phi_size_, T(1), work.phi.get(), T(0), nullptr, phi_sums_.row(member.group),
                   !member.first_in_group, run.share);
    run.sync();
  }
}

// d loss / d rates = -rate * lambda_{k+1} * g_k, element by element.
template <typename T>
void MetaStep<T>::add_rates_gradient(Member& member, Index k) const {
  Run<T>& run = member.support;
  T* sum = rates_sums_.row(member.group) + rate_row(k) * theta_size_;
  kernels_.update(theta_size_, -rate_, member.work->adjoint.get(), sum, step_gradient(member, k),
                  sum, run.share);
  run.sync();
}

// The direction of the Hessian product at step k, but for the factor `rate`.
template <typename T>
const T* MetaStep<T>::direction(Member& member, Index k) const {
  const T* adjoint = member.work->adjoint.get();
  if (updates_) return member.work->direction.get();
  const T* rates = rates_at(k);
  if (rates == nullptr) return adjoint;
  T* out = member.work->direction.get();
  const Range part = split(theta_size_, member.support.share);
  for (Index i = part.begin; i < part.end; ++i) out[i] = rates[i] * adjoint[i];
  member.support.sync();
  return out;
}

// Leaves H_k A_k lambda_{k+1} / rate in `product`, and subtracts it from the adjoint unless k = 0,
// where finish_task does both that and the sum over tasks in one pass.
template <typename T>
void MetaStep<T>::adjoint_step(Member& member, Index k) const {
  Workspace& work = *member.work;
  bind(member, k);
  Run<T>& run = member.support;
  run.tangents = work.tangents.get();
  run.tangent_sources = kTheta;
  run.directions = {direction(member, k), work.direction_transposed.get(), nullptr, nullptr};
  plan_.theta.transpose(kernels_, run.directions.theta, outer_, work.direction_transposed.get(),
                        run.share, factored_->offsets());
  run.sync();
  run_tangent(run);
  run.second.region = work.second_gradients.get();
  run.second.sources = outer_;
  run.second.theta = work.product.get();
  run.second.phi = work.phi.get();
  run.reset(run.second);
  if (run.has_tangent(plan_.output)) {
    T* dgy = begin_flow(run, run.second);
    if (run.share.part == 0) {
      kernels_.loss_tangent(loss_, run.examples() * plan_.output_rows, plan_.output_columns,
                            run.value(plan_.output), run.tangent(plan_.output), dgy);
    }
    run.sync();
  }
  run_backward_tangent(run);
  factored_->add_adjoint(run, run.second, member.factors, member.task, -rate_);
  if ((outer_ & kPhi) != 0) {
    kernels_.axpby(phi_size_, -rate_, work.phi.get(), T(0), nullptr, phi_sums_.row(member.group),
                   true, run.share);
  }
  if (k > 0) {
    T* adjoint = work.adjoint.get();
    for_others([&](Index at, Index count) {
      kernels_.update(count, -rate_, nullptr, adjoint + at, work.product.get() + at, adjoint + at,
                      run.share);
    });
  }
  run.sync();
}

template <typename T>
void MetaStep<T>::finish_task(Member& member, bool pending) const {
  if (args_.gtheta == nullptr || (theta_size_ == 0 && !gradient_by_task())) return;
  const Workspace& work = *member.work;
  T* sum = gradient_by_task() ? work.adjoint.get() : theta_sums_.row(member.group);
  factored_->finish(member.support, member.factors, member.task);
  for_others([&](Index at, Index count) {
    kernels_.axpby(count, T(1), work.adjoint.get() + at, -rate_,
                   pending ? work.product.get() + at : nullptr, sum + at,
                   !gradient_by_task() && !member.first_in_group, member.support.share);
  });
  member.support.sync();
  if (!gradient_by_task()) return;
  auto* out = static_cast<T*>(args_.gtheta) + member.task * plan_.theta.size();
  plan_.theta.unpack(work.adjoint.get(), T(1) / static_cast<T>(args_.tasks), out,
                     member.support.share);
  member.support.sync();
}

template void MetaStep<float>::run_task(Member&) const;
template void MetaStep<double>::run_task(Member&) const;

}  // namespace fastmaml
