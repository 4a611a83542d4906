#include "cpu/program_inner.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastmaml {

namespace {

constexpr double kClipEps = 1e-6;  // added to the norm, as torch.nn.utils.clip_grad_norm_ does

}  // namespace

template <typename T>
InnerUpdates<T>::InnerUpdates(const Plan<T>& plan, ArenaPool& memory, const MetaStepArgs& args,
                              Index groups)
    : plan_(plan),
      kernels_(*plan.kernels),
      rule_(*args.update),
      steps_(args.steps),
      tasks_(args.tasks),
      size_(plan.theta.packed_size()),
      blocks_((size_ + kInnerBlock - 1) / kInnerBlock) {
  for (const InnerCoefficientArgs& given : rule_.coefficients) {
    Coefficient c;
    c.values = static_cast<const T*>(given.values);
    c.rows = given.rows;
    c.width = given.each ? size_ : 1;
    c.gradient = given.gradient;
    wants_gradient_ = wants_gradient_ || given.gradient != nullptr;
    if (given.each) {
      c.packed = memory.take<T>(c.rows * size_);
      for (Index row = 0; row < c.rows; ++row) {
        plan_.theta.pack(c.values + row * plan_.sizes.theta, c.packed.get() + row * size_, Share{});
      }
      c.values = c.packed.get();
      if (c.gradient != nullptr) {
        c.sums = GroupSums<T>(memory, groups, c.rows * size_);
        c.sums.clear();
      }
    } else {
      c.first_scalar = scalars_;
      scalars_ += c.rows;
    }
    coefficients_.push_back(std::move(c));
  }
  scalar_sums_ = GroupSums<T>(memory, groups, scalars_);
  scalar_sums_.clear();
}

template <typename T>
typename InnerUpdates<T>::Workspace InnerUpdates<T>::workspace(ArenaPool& memory) const {
  Workspace work;
  for (Index k = 0; k + 1 < steps_; ++k) {
    if (rule_.momentum) work.m.push_back(memory.take<T>(size_));
    if (rule_.second_moment) work.v.push_back(memory.take<T>(size_));
  }
  if (rule_.momentum) work.adjoint_m = memory.take<T>(size_);
  if (rule_.second_moment) work.adjoint_v = memory.take<T>(size_);
  work.blocks = memory.take<T>((kInnerCoefficients + 1) * blocks_);
  work.norms.resize(static_cast<std::size_t>(steps_));
  return work;
}

template <typename T>
T InnerUpdates<T>::total(const T* blocks) const {
  T sum = 0;
  for (Index i = 0; i < blocks_; ++i) sum += blocks[i];
  return sum;
}

template <typename T>
T InnerUpdates<T>::clip_factor(T norm) const {
  if (rule_.clip_norm == 0) return 1;
  return std::min(T(1), static_cast<T>(rule_.clip_norm) / (norm + static_cast<T>(kClipEps)));
}

template <typename T>
InnerStep<T> InnerUpdates<T>::at(const Workspace& work, Index k, const T* theta,
                                 const T* gradient) const {
  InnerStep<T> step;
  step.nesterov = rule_.nesterov;
  step.second_moment = rule_.second_moment;
  step.normalise_first = rule_.normalise_first;
  step.clip_value =
      rule_.clip_value == 0 ? std::numeric_limits<T>::infinity() : static_cast<T>(rule_.clip_value);
  for (int i = 0; i < kInnerCoefficients; ++i) {
    const Coefficient& c = coefficients_[i];
    step.coefficients[i] = c.values + row(c, k) * c.width;
    step.each[i] = c.packed != nullptr;
  }
  step.theta = theta;
  step.gradient = gradient;
  if (k > 0 && rule_.momentum) step.m = work.m[k - 1].get();
  if (k > 0 && rule_.second_moment) step.v = work.v[k - 1].get();
  return step;
}

template <typename T>
void InnerUpdates<T>::step(Run<T>& run, Workspace& work, Index k, const T* theta, const T* gradient,
                           T* out) const {
  InnerStep<T> step = at(work, k, theta, gradient);
  if (rule_.clip_norm != 0) {
    kernels_.block_products(size_, gradient, gradient, work.blocks.get(), run.share);
    run.sync();
    const T norm = std::sqrt(total(work.blocks.get()));
    if (run.share.part == 0) work.norms[k] = norm;
    step.clip_factor = clip_factor(norm);
  }
  const bool last = k + 1 == steps_;
  kernels_.inner_update(size_, step, out, last || !rule_.momentum ? nullptr : work.m[k].get(),
                        last || !rule_.second_moment ? nullptr : work.v[k].get(), run.share);
}

template <typename T>
void InnerUpdates<T>::adjoint(Run<T>& run, Workspace& work, Index k, Index group, const T* theta,
                              const T* gradient, T* lambda, T* direction) const {
  InnerStep<T> step = at(work, k, theta, gradient);
  step.clip_factor = clip_factor(work.norms[k]);
  InnerAdjoint<T> adjoint;
  adjoint.theta = lambda;
  adjoint.gradient = direction;
  adjoint.m = work.adjoint_m.get();
  adjoint.v = work.adjoint_v.get();
  adjoint.has_moments = k + 1 < steps_;
  for (int i = 0; i < kInnerCoefficients; ++i) {
    const Coefficient& c = coefficients_[i];
    if (c.gradient == nullptr) continue;
    if (c.packed != nullptr) {
      adjoint.each[i] = c.sums.row(group) + row(c, k) * size_;
    } else {
      adjoint.sums[i] = work.blocks.get() + i * blocks_;
    }
  }
  const bool clipped = step.clip_factor < 1;
  if (clipped) adjoint.along = work.blocks.get() + kInnerCoefficients * blocks_;
  kernels_.inner_adjoint(size_, step, adjoint, run.share);
  run.sync();
  if (clipped) {
    const T norm = work.norms[k];
    const T bend =
        total(adjoint.along) * step.clip_factor / ((norm + static_cast<T>(kClipEps)) * norm);
    kernels_.update(size_, -bend, nullptr, direction, gradient, direction, run.share);
  }
  if (run.share.part == 0) {
    for (int i = 0; i < kInnerCoefficients; ++i) {
      if (adjoint.sums[i] == nullptr) continue;
      const Coefficient& c = coefficients_[i];
      scalar_sums_.row(group)[c.first_scalar + row(c, k)] += total(adjoint.sums[i]);
    }
  }
  run.sync();
}

template <typename T>
void InnerUpdates<T>::store_gradients(int threads) const {
  const T mean = T(1) / static_cast<T>(tasks_);
  const T* scalars = scalar_sums_.total(kernels_, threads);
  for (const Coefficient& c : coefficients_) {
    if (c.gradient == nullptr) continue;
    auto* out = static_cast<T*>(c.gradient);
    if (c.packed == nullptr) {
      for (Index r = 0; r < c.rows; ++r) out[r] = mean * scalars[c.first_scalar + r];
      continue;
    }
    const T* sums = c.sums.total(kernels_, threads);
    for (Index r = 0; r < c.rows; ++r) {
      plan_.theta.unpack(sums + r * size_, mean, out + r * plan_.theta.size(), Share{});
    }
  }
}

template class InnerUpdates<float>;
template class InnerUpdates<double>;

}  // namespace fastmaml
