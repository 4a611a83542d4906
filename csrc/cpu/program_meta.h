// The meta-step: K inner gradient steps per task, the query loss, and the exact adjoint of it all.
//
//   theta_{k+1} = theta_k - A_k g_k            A_k = diag(rate * rates_k)
//   g_k         = grad L_support(theta_k)
//   lambda_K    = grad L_query(theta_K)
//   lambda_k    = lambda_{k+1} - H_k A_k lambda_{k+1}
//
// H v is a tangent followed by a backward_tangent (Pearlmutter 1994). Everything stays in packed
// layout; only the sums over tasks are unpacked.
//
// With an inner update rule (program_inner.h) the rule's adjoint stands for A: it turns
// lambda_{k+1} into what the Hessian product is taken of, and into the part of lambda_k beside that
// product.
#pragma once

#include <algorithm>
#include <optional>

#include "cpu/program_factors.h"
#include "cpu/program_inner.h"

namespace fastmaml {

template <typename T>
class MetaStep {
 public:
  MetaStep(NativeProgram<T>& program, const MetaStepArgs& args);
  void run();

 private:
  // One inner step's share of the memory that the adjoint needs again.
  struct StepMemory {
    std::shared_ptr<T> values, gradients, transposed;
  };

  // What a team works in, one task after the other.
  struct Workspace {
    std::vector<StepMemory> steps;           // the last ones of K
    std::vector<std::shared_ptr<T>> thetas;  // theta_1 ... theta_K
    std::vector<std::shared_ptr<T>> step_gradients;
    std::shared_ptr<T> support_input, query_input;
    std::shared_ptr<T> adjoint, product, direction, direction_transposed, phi;
    StepMemory query;
    typename InnerUpdates<T>::Workspace inner;
    std::shared_ptr<T> tangents, second_gradients;
  };

  // One thread of a team at one task.
  struct Member {
    Member(const MetaStep& step, const TeamMember& member)
        : support(step.plan_, *step.support_batch_, member),
          query(step.plan_, *step.query_batch_, member),
          factors(step.factored_->view(step.start_.of(0))) {
      if (!step.factored_->empty()) support.factors = query.factors = &factors.in_factors;
    }
    Member(const Member&) = delete;

    Run<T> support, query;
    typename FactoredWeights<T>::View factors;
    Workspace* work = nullptr;
    Index task = 0, group = 0;
    Index loaded = -1;  // the support set that `support` reads
    bool first_in_group = false;
  };

  void allocate();
  void take(Workspace& work) const;
  std::shared_ptr<T> take_theta() const;
  StepMemory take_step(const BatchPlan<T>& batch, bool over_values) const;
  Index step_bytes() const;

  void run_task(Member& member) const;
  void load(Run<T>& run, const void* x, Index set, T* converted) const;
  void inner_step(Member& member, Index k) const;
  void replay(Member& member, Index k) const;
  void query(Member& member) const;
  void adjoint_step(Member& member, Index k) const;
  void add_rates_gradient(Member& member, Index k) const;
  const T* direction(Member& member, Index k) const;
  void finish_task(Member& member, bool pending) const;

  void bind(Member& member, Index k) const;
  // body(begin, count) of what is not in factors, in packed theta.
  template <typename Body>
  void for_others(const Body& body) const {
    for (const Range part : factored_->others()) body(part.begin, part.end - part.begin);
  }
  T loss(Run<T>& run, const void* targets, Index set) const;
  // Which of all sets of support examples a task's step takes.
  Index support_set(const Member& member, Index k) const {
    return k % args_.support_batches * args_.tasks + member.task;
  }
  // Whether tasks have each their own theta at step k, not one that they share.
  bool own_theta(Index k) const { return k > 0 || start_.copies > 1; }
  const T* theta_at(const Member& member, Index k) const {
    return k == 0 ? start_.of(member.task).theta : member.work->thetas[k - 1].get();
  }
  StepMemory& step_memory(Workspace& work, Index k) const {
    return work.steps[std::max<Index>(0, k - first_saved_)];
  }
  T* step_gradient(const Member& member, Index k) const {
    const Index slot = !keeps_gradients() ? 0 : std::max<Index>(0, k - first_saved_);
    return member.work->step_gradients[slot].get();
  }
  const T* rates_at(Index k) const {
    return rates_ == nullptr ? nullptr : rates_.get() + rate_row(k) * theta_size_;
  }
  // Tasks that do not start alike have meta-gradients of their own.
  bool gradient_by_task() const { return args_.gtheta != nullptr && args_.theta_stride > 0; }
  Index rate_row(Index k) const { return args_.rate_steps == 1 ? 0 : k; }
  bool wants_gradient() const {
    return args_.gtheta != nullptr || args_.gshared != nullptr || args_.grates != nullptr ||
           (updates_ && updates_->wants_gradient());
  }
  // The adjoint needs the inner gradients themselves.
  bool keeps_gradients() const { return args_.grates != nullptr || updates_; }
  Index stats_rows() const { return args_.steps + (args_.query_examples > 0 ? 1 : 0); }
  T* stats_row(Index task, Index row) const {
    auto* stats = static_cast<T*>(args_.stats);
    return stats == nullptr ? nullptr : stats + (task * stats_rows() + row) * plan_.sizes.stats;
  }

  NativeProgram<T>& program_;
  const MetaStepArgs& args_;
  const Plan<T>& plan_;
  const Kernels<T>& kernels_;
  const Loss loss_;
  const T rate_;  // minus the factor of Hessian products: with a rule, it is in the direction
  const Index theta_size_, phi_size_;  // packed
  const Sources outer_;                // what the meta-gradient is taken with respect to
  TaskGroups groups_;
  int teams_ = 1;
  Index first_saved_ = 0;

  std::shared_ptr<const BatchPlan<T>> support_batch_, query_batch_;
  PackedParameters<T> start_;
  std::shared_ptr<T> buffers_, rates_;
  std::optional<InnerUpdates<T>> updates_;
  std::optional<FactoredWeights<T>> factored_;
  std::vector<Workspace> workspaces_;
  GroupSums<T> theta_sums_, phi_sums_, rates_sums_;
};

}  // namespace fastmaml
