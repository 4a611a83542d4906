// The native program: the four operations (program.cpp) and the meta-step (program_meta.cpp).
#pragma once

#include <map>
#include <memory>
#include <mutex>

#include "cpu/program_lanes.h"
#include "cpu/program_memory.h"
#include "cpu/program_op.h"
#include "fastmaml/core.h"

namespace fastmaml {

// Sums over tasks must not depend on how many threads there are: tasks are summed in order within
// groups, and the groups in order, and how tasks fall into groups depends on their number and on
// the size of a sum alone.
class TaskGroups {
 public:
  TaskGroups(Index tasks, Index sum_bytes);
  Index count() const { return count_; }
  Range tasks(Index group) const {
    return split(tasks_, Share{static_cast<int>(group), static_cast<int>(count_)});
  }

 private:
  Index tasks_, count_;
};

// Both groups of parameters (or directions in their space), packed, for one or several tasks.
template <typename T>
struct PackedParameters {
  std::shared_ptr<T> theta, theta_transposed, phi, phi_transposed;
  Index copies = 1;  // of theta: one for all tasks, or one each (without transposes)
  Index stride = 0;  // elements from one copy to the next
  Sources transposed_for = 0;

  Weights<T> of(Index task) const;
};

template <typename T>
class NativeProgram final : public Program, public std::enable_shared_from_this<NativeProgram<T>> {
 public:
  explicit NativeProgram(const ProgramSpec& spec);

  ProgramSizes sizes() const override;
  std::shared_ptr<Context> forward(const ForwardArgs& args) override;
  std::shared_ptr<Gradient> backward(Context& context, const BackwardArgs& args) override;
  std::shared_ptr<Tangent> tangent(Context& context, const TangentArgs& args) override;
  void backward_tangent(Context& context, Gradient& gradient, Tangent& tangent,
                        const BackwardTangentArgs& args) override;
  void meta_step(const MetaStepArgs& args) override;
  int useful_threads(Index tasks, Index examples, Index passes, int threads) const override;
  bool suits_lanes(Index tasks, Index examples) const override {
    return lanes_.suits(tasks, examples, plan_.kernels->lanes, sizeof(T));
  }
  void pack_theta(const void* theta, Index rows, void* packed, int threads) override;
  void unpack_theta(const void* packed, Index rows, void* theta, int threads) override;
  std::vector<Index> packing() const override { return plan_.theta.packing(); }

  const Plan<T>& plan() const { return plan_; }
  ArenaPool& memory() const { return *memory_; }
  std::shared_ptr<const BatchPlan<T>> batch(Index examples);

  PackedParameters<T> pack(const T* theta, Index stride, Index tasks, const T* phi, int threads);
  // The same of a theta that is packed already and is read where it lies.
  PackedParameters<T> pack_phi(const T* packed_theta, Index stride, Index tasks, const T* phi);
  PackedParameters<T> parameters(bool packed, const T* theta, Index stride, Index tasks,
                                 const T* phi, int threads) {
    return packed ? pack_phi(theta, stride, tasks, phi) : pack(theta, stride, tasks, phi, threads);
  }
  // Makes the transposes that differentiating `sources` reads, unless they are there, but for those
  // of a theta that each task has its own of.
  void transpose_shared(PackedParameters<T>& parameters, Sources sources, int threads);
  std::shared_ptr<T> pack_buffers(const T* buffers);

 private:
  const Plan<T> plan_;
  const LaneNetwork lanes_;
  const std::shared_ptr<ArenaPool> memory_ = std::make_shared<ArenaPool>();
  std::map<Index, std::shared_ptr<const BatchPlan<T>>> batches_;
  std::mutex call_mutex_;  // one call at a time
};

// Throws where the arguments of a meta-step do not fit each other or the program.
void check_meta_step(const MetaStepArgs& args, const ProgramSizes& sizes, Index output_rows,
                     Index output_columns);

// Elements of a region of gradients with respect to `sources`; see Flow for `over_values`.
template <typename T>
Index gradient_region_size(const Plan<T>& plan, const BatchPlan<T>& batch, Sources sources,
                           bool over_values = false);

// Between torch's layout and the program's, one task at a time, shared by its team.
template <typename T>
void load_input(Run<T>& run, const T* x, T* out);
template <typename T>
void store_output(Run<T>& run, const T* from, T* y);
// Puts the output's gradient, given in torch's layout, into a reset flow.
template <typename T>
void load_output_gradient(Run<T>& run, Flow<T>& flow, const T* gy);
// Resets the flow and marks the output's gradient as arrived; the caller writes it there.
template <typename T>
T* begin_flow(Run<T>& run, Flow<T>& flow);
template <typename T>
void store_stats(const Run<T>& run, T* stats);

}  // namespace fastmaml
