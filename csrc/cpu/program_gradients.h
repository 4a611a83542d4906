// What the passes over gradients of all tasks (program.cpp) share: where gradients go, and the
// transposed weights that they read.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cpu/program.h"

namespace fastmaml {

inline Sources sources_of(const void* theta, const void* phi, const void* input) {
  return (theta != nullptr ? kTheta : 0) | (phi != nullptr ? kPhi : 0) |
         (input != nullptr ? kInput : 0);
}

// One region per task where they are kept, else one per team.
template <typename T>
std::vector<std::shared_ptr<T>> take_regions(ArenaPool& memory, Index count, Index size) {
  std::vector<std::shared_ptr<T>> regions;
  for (Index i = 0; i < count; ++i) regions.push_back(memory.take<T>(size));
  return regions;
}

// Where a caller wants gradients; null where not. `sum_theta`: one row for all tasks.
struct GradientArgs {
  void* theta;
  void* phi;
  void* x;
  bool sum_theta;
  int threads;
};

// Parameter and input gradients of all tasks on their way out; the passes leave them in a flow.
// What is summed over tasks is added up in rows, one for each group of tasks.
template <typename T>
class GradientOutput {
 public:
  GradientOutput(const NativeProgram<T>& program, Index tasks, Index examples, bool packed,
                 const GradientArgs& args)
      : plan_(program.plan()),
        tasks_(tasks),
        examples_(examples),
        packed_(packed),
        theta_(static_cast<T*>(args.theta)),
        phi_(static_cast<T*>(args.phi)),
        x_(static_cast<T*>(args.x)),
        sums_theta_(theta_ != nullptr && args.sum_theta),
        threads_(args.threads),
        groups_(tasks, (theta_sum_size() + phi_sum_size()) * static_cast<Index>(sizeof(T))) {
    ArenaPool& memory = program.memory();
    theta_sums_ = GroupSums<T>(memory, groups_.count(), theta_sum_size());
    phi_sums_ = GroupSums<T>(memory, groups_.count(), phi_sum_size());
    const bool rearranged = theta_ != nullptr && !packed_ && !sums_theta_;
    by_team_ = take_regions<T>(memory, teams(), rearranged ? plan_.theta.packed_size() : 0);
  }

  Sources sources() const { return sources_of(theta_, phi_, x_); }
  int teams() const { return team_count(units(), threads_); }

  // Calls body(member, task), in order within each unit.
  template <typename Body>
  void for_each_task(const Body& body) const {
    for_each_unit(units(), threads_, [&](const TeamMember& member, Index unit) {
      const Range tasks = sums() ? groups_.tasks(unit) : Range{unit, unit + 1};
      for (Index task = tasks.begin; task < tasks.end; ++task) body(member, task);
    });
  }

  void prepare(Flow<T>& flow, const TeamMember& member, Index task) const {
    flow.theta = sums_theta_ ? theta_sums_.row(group(task))
                 : packed_   ? packed_row(task)
                             : by_team_[member.team].get();
    flow.phi = phi_ == nullptr ? nullptr : phi_sums_.row(group(task));
    flow.sources = sources();
  }

  // Of a reset flow: the sums of the tasks before in the group stand in it.
  void add_to_sums(Flow<T>& flow, Index task) const {
    if (!sums() || task == groups_.tasks(group(task)).begin) return;
    for (std::size_t slot = 0; slot < plan_.slots.size(); ++slot) {
      flow.slot_written[slot] = plan_.slots[slot].adapted ? sums_theta_ : phi_ != nullptr;
    }
  }

  void store(Run<T>& run, const Flow<T>& flow, Index task) const {
    if (theta_ != nullptr && !sums_theta_) store_theta(run, flow, task);
    if (x_ != nullptr) store_input(run, flow, x_ + task * examples_ * plan_.input_size);
    run.sync();
  }

  void finish() const {
    if (sums_theta_) {
      const T* total = theta_sums_.total(*plan_.kernels, threads_);
      if (packed_) {
        std::copy(total, total + plan_.theta.packed_size(), theta_);
        plan_.theta.clear_unused(theta_);
      } else {
        unpack(plan_.theta, total, theta_);
      }
    }
    if (phi_ != nullptr) unpack(plan_.phi, phi_sums_.total(*plan_.kernels, threads_), phi_);
  }

 private:
  bool sums() const { return sums_theta_ || phi_ != nullptr; }
  // Tasks are taken one by one, or in the groups that their sums need.
  Index units() const { return sums() ? groups_.count() : tasks_; }
  Index theta_sum_size() const { return sums_theta_ ? plan_.theta.packed_size() : 0; }
  Index phi_sum_size() const { return phi_ == nullptr ? 0 : plan_.phi.packed_size(); }

  Index group(Index task) const {
    Index group = 0;
    while (groups_.tasks(group).end <= task) ++group;
    return group;
  }

  T* packed_row(Index task) const {
    return theta_ == nullptr ? nullptr : theta_ + task * plan_.theta.row_size();
  }

  void store_theta(Run<T>& run, const Flow<T>& flow, Index task) const {
    if (!packed_) {
      plan_.theta.unpack(flow.theta, T(1), theta_ + task * plan_.theta.size(), run.share);
    } else if (run.share.part == 0) {
      plan_.theta.clear_unused(packed_row(task));
    }
  }

  void store_input(Run<T>& run, const Flow<T>& flow, T* gx) const {
    const T* from = run.arrived(flow, 0);
    if (from == nullptr) {
      const Range part = split(examples_ * plan_.input_size, run.share);
      std::fill(gx + part.begin, gx + part.end, T(0));
      return;
    }
    run.kernels.rearrange(examples_, plan_.input_gradient_to_torch, from, gx, Moving::kWrite,
                          run.share);
  }

  // Null: the group has no slots, and its gradient is zero.
  static void unpack(const ParameterGroup& group, const T* total, T* out) {
    if (total == nullptr) {
      std::fill(out, out + group.size(), T(0));
    } else {
      group.unpack(total, T(1), out, Share{});
    }
  }

  const Plan<T>& plan_;
  Index tasks_, examples_;
  bool packed_;
  T *theta_, *phi_, *x_;
  bool sums_theta_;
  int threads_;
  TaskGroups groups_;
  GroupSums<T> theta_sums_, phi_sums_;
  std::vector<std::shared_ptr<T>> by_team_;
};

// The transposes of parameters (or directions) that differentiating `sources` reads. Of those that
// tasks share there is one; of a task's own they are made where its run begins, and do not leave
// the core's cache.
template <typename T>
class TaskTransposes {
 public:
  TaskTransposes(NativeProgram<T>& program, PackedParameters<T>& parameters, Sources sources,
                 int teams, int threads)
      : plan_(program.plan()), sources_(sources) {
    program.transpose_shared(parameters, sources, threads);
    if (parameters.copies == 1 || parameters.theta == nullptr) return;
    by_team_ = take_regions<T>(program.memory(), teams, plan_.theta.transposed_size());
  }

  // All of a team come here; `weights` are its task's.
  void bind(const Run<T>& run, Weights<T>& weights) const {
    if (by_team_.empty()) return;
    T* transposed = by_team_[run.member.team].get();
    plan_.theta.transpose(run.kernels, weights.theta, sources_, transposed, run.share);
    weights.theta_transposed = transposed;
    run.sync();
  }

 private:
  const Plan<T>& plan_;
  Sources sources_;
  std::vector<std::shared_ptr<T>> by_team_;
};

}  // namespace fastmaml
