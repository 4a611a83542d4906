// The meta-step: K inner gradient steps per task, the query loss, and the exact adjoint of it all.
//
//   theta_{k+1} = theta_k - A_k g_k          A_k = diag(rate * rates_k), g_k = grad
//   L_support(theta_k) lambda_K    = grad L_query(theta_K) lambda_k    = lambda_{k+1} - H_k A_k
//   lambda_{k+1}
//
// H v is a tangent followed by a backward_tangent (Pearlmutter 1994). Everything stays in packed
// layout; only the sums over tasks are unpacked.
//
// With an inner update rule (program_inner.h) the rule's adjoint stands for A: it turns
// lambda_{k+1} into what the Hessian product is taken of, and into the part of lambda_k beside that
// product.
#include <algorithm>
#include <optional>

#include "cpu/program_inner.h"

namespace fastmaml {

namespace {

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
          query(step.plan_, *step.query_batch_, member) {}

    Run<T> support, query;
    Workspace* work = nullptr;
    Index task = 0, group = 0;
    Index loaded = -1;  // the support set that `support` reads
    bool first_in_group = false;
  };

  void allocate();
  void take(Workspace& work) const;
  std::shared_ptr<T> take_theta() const;
  StepMemory take_step(const BatchPlan<T>& batch, Sources sources) const;
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
  T loss(Run<T>& run, const void* targets, Index set) const;
  // Which of all sets of support examples a task's step takes.
  Index support_set(const Member& member, Index k) const {
    return k % args_.support_batches * args_.tasks + member.task;
  }
  const T* theta_at(const Member& member, Index k) const {
    return k == 0 ? start_.theta.get() : member.work->thetas[k - 1].get();
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
  std::vector<Workspace> workspaces_;
  GroupSums<T> theta_sums_, phi_sums_, rates_sums_;
};

template <typename T>
MetaStep<T>::MetaStep(NativeProgram<T>& program, const MetaStepArgs& args)
    : program_(program),
      args_(args),
      plan_(program.plan()),
      kernels_(*plan_.kernels),
      loss_(args.loss == TaskLoss::kCrossEntropy ? Loss::kCrossEntropy : Loss::kMeanSquaredError),
      rate_(args.update == nullptr ? static_cast<T>(args.rate) : T(-1)),
      theta_size_(plan_.theta.packed_size()),
      phi_size_(plan_.phi.packed_size()),
      outer_(kTheta | (args.gshared != nullptr && phi_size_ > 0 ? kPhi : 0)),
      groups_(std::max<Index>(1, args.tasks), theta_size_ * static_cast<Index>(sizeof(T))) {
  check_meta_step(args, plan_.sizes, plan_.output_rows, plan_.output_columns);
  support_batch_ = program.batch(std::max<Index>(1, args.support_examples));
  query_batch_ = program.batch(std::max<Index>(1, args.query_examples));
  teams_ = team_count(groups_.count(), args.threads);
  start_ = program.pack(static_cast<const T*>(args.theta), 0, args.tasks,
                        static_cast<const T*>(args.shared), args.threads);
  program.transpose(start_, outer_, args.threads);
  buffers_ = program.pack_buffers(static_cast<const T*>(args.buffers));
  allocate();
}

template <typename T>
Index MetaStep<T>::step_bytes() const {
  const Index gradients = keeps_gradients() ? theta_size_ : 0;
  return static_cast<Index>(sizeof(T)) *
         (support_batch_->value_size + gradient_region_size(plan_, *support_batch_, outer_) +
          plan_.theta.transposed_size() + gradients);
}

template <typename T>
void MetaStep<T>::allocate() {
  ArenaPool& memory = program_.memory();
  if (args_.update != nullptr) updates_.emplace(plan_, memory, args_, groups_.count());
  const Index affordable =
      static_cast<Index>(args_.memory_budget_bytes) / (teams_ * std::max<Index>(1, step_bytes()));
  const bool returns = wants_gradient() && (!args_.first_order || keeps_gradients());
  const Index saved = returns ? std::max<Index>(1, std::min(args_.steps, affordable)) : 1;
  first_saved_ = std::max<Index>(0, args_.steps - saved);
  if (args_.rates != nullptr) {
    rates_ = memory.take<T>(args_.rate_steps * theta_size_);
    for (Index row = 0; row < args_.rate_steps; ++row) {
      plan_.theta.pack(static_cast<const T*>(args_.rates) + row * plan_.sizes.theta,
                       rates_.get() + row * theta_size_, Share{});
    }
  }
  const Index groups = groups_.count();
  if (args_.gtheta != nullptr) theta_sums_ = GroupSums<T>(memory, groups, theta_size_);
  if ((outer_ & kPhi) != 0) phi_sums_ = GroupSums<T>(memory, groups, phi_size_);
  if (args_.grates != nullptr) {
    rates_sums_ = GroupSums<T>(memory, groups, args_.rate_steps * theta_size_);
  }
  workspaces_.resize(teams_);
  for (Workspace& work : workspaces_) take(work);
}

template <typename T>
typename MetaStep<T>::StepMemory MetaStep<T>::take_step(const BatchPlan<T>& batch,
                                                        Sources sources) const {
  ArenaPool& memory = program_.memory();
  return {memory.take<T>(batch.value_size),
          memory.take<T>(gradient_region_size(plan_, batch, sources)),
          memory.take<T>(plan_.theta.transposed_size())};
}

// What kernels do not write is zero: it takes part in sums over all elements.
template <typename T>
std::shared_ptr<T> MetaStep<T>::take_theta() const {
  std::shared_ptr<T> theta = program_.memory().template take<T>(theta_size_);
  if (theta != nullptr) plan_.theta.clear_gaps(theta.get());
  return theta;
}

template <typename T>
void MetaStep<T>::take(Workspace& work) const {
  ArenaPool& memory = program_.memory();
  const Index saved = args_.steps - first_saved_;
  for (Index i = 0; i < saved; ++i) work.steps.push_back(take_step(*support_batch_, outer_));
  for (Index k = 0; k < args_.steps; ++k) work.thetas.push_back(memory.take<T>(theta_size_));
  const Index gradients = args_.steps == 0 ? 0 : keeps_gradients() ? saved : 1;
  for (Index i = 0; i < gradients; ++i) work.step_gradients.push_back(take_theta());
  if (updates_) work.inner = updates_->workspace(memory);
  if (!plan_.input_from_torch.empty()) {
    work.support_input = memory.take<T>(support_batch_->examples * plan_.storages[0].size);
    work.query_input = memory.take<T>(query_batch_->examples * plan_.storages[0].size);
  }
  if (args_.query_examples == 0) return;
  if (!wants_gradient()) {
    work.query.values = memory.take<T>(query_batch_->value_size);
    work.query.gradients = memory.take<T>(gradient_region_size(plan_, *query_batch_, outer_));
    return;
  }
  work.query = take_step(*query_batch_, outer_);
  work.adjoint = take_theta();
  work.phi = memory.take<T>((outer_ & kPhi) != 0 ? phi_size_ : 0);
  if (args_.steps == 0) return;
  if (rates_ != nullptr || updates_) work.direction = memory.take<T>(theta_size_);
  if (args_.first_order) return;
  work.product = take_theta();
  work.direction_transposed = memory.take<T>(plan_.theta.transposed_size());
  work.tangents = memory.take<T>(support_batch_->tangent_size);
  work.second_gradients = memory.take<T>(gradient_region_size(plan_, *support_batch_, outer_));
}

template <typename T>
void MetaStep<T>::run() {
  for_each_unit(groups_.count(), args_.threads, [&](const TeamMember& team, Index group) {
    Member member(*this, team);
    member.work = &workspaces_[team.team];
    member.group = group;
    const Range tasks = groups_.tasks(group);
    for (member.task = tasks.begin; member.task < tasks.end; ++member.task) {
      member.first_in_group = member.task == tasks.begin;
      run_task(member);
    }
  });
  const T mean = T(1) / static_cast<T>(args_.tasks);
  const auto store = [&](const ParameterGroup& group, const GroupSums<T>& sums, Index rows,
                         void* out) {
    if (out == nullptr) return;
    const T* total = sums.total(kernels_, args_.threads);
    ThreadPool::instance().run(args_.threads, [&](int part) {
      for (Index row = 0; row < rows; ++row) {
        group.unpack(total + row * group.packed_size(), mean,
                     static_cast<T*>(out) + row * group.size(), Share{part, args_.threads});
      }
    });
  };
  store(plan_.theta, theta_sums_, 1, args_.gtheta);
  store(plan_.phi, phi_sums_, 1, args_.gshared);
  store(plan_.theta, rates_sums_, args_.rate_steps, args_.grates);
  if (updates_) updates_->store_gradients(args_.threads);
}

template <typename T>
void MetaStep<T>::run_task(Member& member) const {
  member.loaded = -1;
  if (args_.query_examples > 0) {
    load(member.query, args_.query_x, member.task, member.work->query_input.get());
  }
  for (Index k = 0; k < args_.steps; ++k) inner_step(member, k);
  if (args_.adapted != nullptr) {
    auto* out = static_cast<T*>(args_.adapted) + member.task * plan_.theta.size();
    plan_.theta.unpack(theta_at(member, args_.steps), T(1), out, member.support.share);
    member.support.sync();
    if (member.support.share.part == 0) {
      plan_.theta.copy_uncovered(static_cast<const T*>(args_.theta), out);
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
  run.weights = start_.of(plan_, 0);
  if (k > 0) {
    run.weights.theta = theta_at(member, k);
    run.weights.theta_transposed = memory.transposed.get();
  }
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
    const bool labels = loss_ == Loss::kCrossEntropy;
    value = kernels_.loss_gradient(
        loss_, rows, plan_.output_columns, run.value(plan_.output),
        labels ? static_cast<const std::int64_t*>(targets) + set * rows : nullptr,
        labels ? nullptr : static_cast<const T*>(targets) + offset, gy);
  }
  run.sync();
  return value;
}

// Forward and backward at theta_k.
template <typename T>
void MetaStep<T>::replay(Member& member, Index k) const {
  bind(member, k);
  Run<T>& run = member.support;
  if (k > 0) {
    plan_.theta.transpose(kernels_, theta_at(member, k), outer_,
                          step_memory(*member.work, k).transposed.get(), run.share);
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
    kernels_.update(theta_size_, -rate_, rates_at(k), theta, gradient, next, run.share);
  }
  run.sync();
}

template <typename T>
void MetaStep<T>::query(Member& member) const {
  Run<T>& run = member.query;
  Workspace& work = *member.work;
  run.values = work.query.values.get();
  run.weights = start_.of(plan_, 0);
  if (args_.steps > 0) {
    run.weights.theta = theta_at(member, args_.steps);
    run.weights.theta_transposed = work.query.transposed.get();
  }
  run_forward(run);
  store_stats(run, stats_row(member.task, args_.steps));
  if (args_.predictions != nullptr) {
    store_output(run, run.value(plan_.output),
                 static_cast<T*>(args_.predictions) +
                     member.task * args_.query_examples * plan_.output_size);
  }
  if (args_.query_y == nullptr) return;
  run.first.region = work.query.gradients.get();
  const T value = loss(run, args_.query_y, member.task);
  if (args_.losses != nullptr && run.share.part == 0) {
    static_cast<T*>(args_.losses)[member.task] = value;
  }
  if (!wants_gradient()) return;
  if (args_.steps > 0) {
    plan_.theta.transpose(kernels_, run.weights.theta, outer_, work.query.transposed.get(),
                          run.share);
    run.sync();
  }
  run.first.sources = outer_;
  run.first.theta = work.adjoint.get();
  run.first.phi = work.phi.get();
  run_backward(run, run.first);
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
  const bool first = member.first_in_group && (args_.rate_steps > 1 || k == args_.steps - 1);
  if (first) {
    kernels_.axpby(theta_size_, T(0), member.work->adjoint.get(), T(0), nullptr, sum, false,
                   run.share);
    run.sync();
  }
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
                        run.share);
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
  if ((outer_ & kPhi) != 0) {
    kernels_.axpby(phi_size_, -rate_, work.phi.get(), T(0), nullptr, phi_sums_.row(member.group),
                   true, run.share);
  }
  if (k > 0) {
    kernels_.update(theta_size_, -rate_, nullptr, work.adjoint.get(), work.product.get(),
                    work.adjoint.get(), run.share);
  }
  run.sync();
}

template <typename T>
void MetaStep<T>::finish_task(Member& member, bool pending) const {
  if (args_.gtheta == nullptr || theta_size_ == 0) return;
  const Workspace& work = *member.work;
  kernels_.axpby(theta_size_, T(1), work.adjoint.get(), -rate_,
                 pending ? work.product.get() : nullptr, theta_sums_.row(member.group),
                 !member.first_in_group, member.support.share);
  member.support.sync();
}

}  // namespace

template <typename T>
void NativeProgram<T>::meta_step(const MetaStepArgs& args) {
  std::lock_guard<std::mutex> lock(call_mutex_);
  MetaStep<T>(*this, args).run();
}

template void NativeProgram<float>::meta_step(const MetaStepArgs&);
template void NativeProgram<double>::meta_step(const MetaStepArgs&);

}  // namespace fastmaml
