// The meta-step as a whole: memory, groups of tasks, sums over them.
#include "cpu/program_meta.h"

#include <numeric>

namespace fastmaml {

template <typename T>
MetaStep<T>::MetaStep(NativeProgram<T>& program, const MetaStepArgs& args)
    : program_(program),
      args_(args),
      plan_(program.plan()),
      kernels_(*plan_.kernels),
      loss_(kernel_loss(args.loss)),
      rate_(args.update == nullptr ? static_cast<T>(args.rate) : T(-1)),
      theta_size_(plan_.theta.packed_size()),
      phi_size_(plan_.phi.packed_size()),
      outer_(kTheta | (args.gshared != nullptr && phi_size_ > 0 ? kPhi : 0)),
      groups_(std::max<Index>(1, args.tasks), theta_size_ * static_cast<Index>(sizeof(T))) {
  support_batch_ = program.batch(std::max<Index>(1, args.support_examples));
  query_batch_ = program.batch(std::max<Index>(1, args.query_examples));
  teams_ = team_count(groups_.count(), args.threads);
  start_ = program.pack(static_cast<const T*>(args.theta), args.theta_stride, args.tasks,
                        static_cast<const T*>(args.shared), args.threads);
  program.transpose_shared(start_, outer_, args.threads);
  buffers_ = program.pack_buffers(static_cast<const T*>(args.buffers));
  allocate();
}

template <typename T>
Index MetaStep<T>::step_bytes() const {
  const Index gradients = keeps_gradients() ? theta_size_ : 0;
  return static_cast<Index>(sizeof(T)) *
         (support_batch_->value_size + gradient_region_size(plan_, *support_batch_, outer_) +
          plan_.theta.transposed_size() - factored_->transposed_size() + gradients);
}

template <typename T>
void MetaStep<T>::allocate() {
  ArenaPool& memory = program_.memory();
  factored_.emplace(plan_, memory, args_, teams_);
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
  if (args_.gtheta != nullptr && !gradient_by_task()) {
    theta_sums_ = GroupSums<T>(memory, groups, theta_size_);
  }
  if ((outer_ & kPhi) != 0) phi_sums_ = GroupSums<T>(memory, groups, phi_size_);
  if (args_.grates != nullptr) {
    rates_sums_ = GroupSums<T>(memory, groups, args_.rate_steps * theta_size_);
    rates_sums_.clear();
  }
  workspaces_.resize(teams_);
  for (Workspace& work : workspaces_) take(work);
}

template <typename T>
typename MetaStep<T>::StepMemory MetaStep<T>::take_step(const BatchPlan<T>& batch,
                                                        bool over_values) const {
  ArenaPool& memory = program_.memory();
  return {memory.take<T>(batch.value_size),
          memory.take<T>(gradient_region_size(plan_, batch, outer_, over_values)),
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
  for (Index i = 0; i < saved; ++i) work.steps.push_back(take_step(*support_batch_, false));
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
    work.query.gradients = memory.take<T>(gradient_region_size(plan_, *query_batch_, outer_, true));
    return;
  }
  work.query = take_step(*query_batch_, true);
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
  const auto store = [&](const ParameterGroup& group, const T* total, Index rows, void* out) {
    if (out == nullptr) return;
    ThreadPool::instance().run(args_.threads, [&](int part) {
      for (Index row = 0; row < rows; ++row) {
        group.unpack(total + row * group.packed_size(), mean,
                     static_cast<T*>(out) + row * group.size(), Share{part, args_.threads});
      }
    });
  };
  if (!gradient_by_task()) {
    T* total = theta_sums_.total(kernels_, args_.threads, factored_->others());
    factored_->store(total, args_.threads);
    store(plan_.theta, total, 1, args_.gtheta);
  }
  store(plan_.phi, phi_sums_.total(kernels_, args_.threads), 1, args_.gshared);
  store(plan_.theta, rates_sums_.total(kernels_, args_.threads), args_.rate_steps, args_.grates);
  if (updates_) updates_->store_gradients(args_.threads);
}

template <typename T>
void NativeProgram<T>::meta_step(const MetaStepArgs& args) {
  std::lock_guard<std::mutex> lock(call_mutex_);
  check_meta_step(args, plan_.sizes, plan_.output_rows, plan_.output_columns);
  if (LaneMetaStep<T>::takes(lanes_, *plan_.kernels, args)) {
    LaneMetaStep<T>(lanes_, *plan_.kernels, *memory_, args).run();
  } else {
    MetaStep<T>(*this, args).run();
  }
  if (args.mean_loss == nullptr) return;
  const T* losses = static_cast<const T*>(args.losses);
  const double sum = std::accumulate(losses, losses + args.tasks, 0.0);
  *static_cast<T*>(args.mean_loss) = static_cast<T>(sum / static_cast<double>(args.tasks));
}

template void NativeProgram<float>::meta_step(const MetaStepArgs&);
template void NativeProgram<double>::meta_step(const MetaStepArgs&);

}  // namespace fastmaml
