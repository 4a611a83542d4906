// What the four operations and the meta-step share.
#include <algorithm>

#include "cpu/program.h"
#include "cpu/program_plan.h"

namespace fastmaml {

namespace {

constexpr Index kMostGroups = 16;
// Multiplications that outweigh waking a thread, and meeting another one after every op.
constexpr Index kWorthAThread = 200'000;
constexpr Index kWorthATeam = 1'000'000;
constexpr Index kMostSumBytes = Index{256} << 20;

}  // namespace

TaskGroups::TaskGroups(Index tasks, Index sum_bytes) : tasks_(tasks) {
  const Index affordable = std::max<Index>(2, kMostSumBytes / std::max<Index>(1, sum_bytes));
  count_ = std::min({tasks, kMostGroups, affordable});
}

template <typename T>
T* GroupSums<T>::total(const Kernels<T>& kernels, int threads,
                       const std::vector<Range>& parts) const {
  if (width_ == 0) return nullptr;
  ThreadPool::instance().run(threads, [&](int thread) {
    for (Index group = 1; group < groups_; ++group) {
      for (const Range part : parts) {
        kernels.axpby(part.end - part.begin, T(1), row(group) + part.begin, T(0), nullptr,
                      row(0) + part.begin, true, Share{thread, threads});
      }
    }
  });
  return row(0);
}

template <typename T>
Weights<T> PackedParameters<T>::of(Index task) const {
  return {theta == nullptr ? nullptr : theta.get() + task * stride, theta_transposed.get(),
          phi.get(), phi_transposed.get()};
}

template <typename T>
NativeProgram<T>::NativeProgram(const ProgramSpec& spec)
    : plan_(make_plan(spec, kernels<T>())), lanes_(LaneNetwork::of(spec)) {}

template <typename T>
ProgramSizes NativeProgram<T>::sizes() const {
  ProgramSizes sizes = plan_.sizes;
  sizes.packed_theta = plan_.theta.row_size();
  return sizes;
}

template <typename T>
int NativeProgram<T>::useful_threads(Index tasks, Index examples, Index passes, int threads) const {
  const Index work = tasks * examples * passes * plan_.multiplications;
  const Index worth = tasks < threads ? kWorthATeam * passes : kWorthAThread;
  return static_cast<int>(std::min<Index>(threads, 1 + work / worth));
}

template <typename T>
std::shared_ptr<const BatchPlan<T>> NativeProgram<T>::batch(Index examples) {
  constexpr std::size_t kMostBatches = 64;
  auto found = batches_.find(examples);
  if (found == batches_.end()) {
    if (batches_.size() >= kMostBatches) batches_.clear();
    found = batches_.emplace(examples, std::make_shared<BatchPlan<T>>(plan_, examples)).first;
  }
  return found->second;
}

template <typename T>
PackedParameters<T> NativeProgram<T>::pack(const T* theta, Index stride, Index tasks, const T* phi,
                                           int threads) {
  const Index size = plan_.theta.packed_size();
  PackedParameters<T> packed = pack_phi(nullptr, stride == 0 ? 0 : size, tasks, phi);
  if (theta != nullptr) {
    packed.theta = memory_->take<T>(packed.copies * size);
    for_each_unit(packed.copies, threads, [&](const TeamMember& member, Index copy) {
      plan_.theta.pack(theta + copy * stride, packed.theta.get() + copy * size, member.share);
    });
  }
  return packed;
}

template <typename T>
PackedParameters<T> NativeProgram<T>::pack_phi(const T* packed_theta, Index stride, Index tasks,
                                               const T* phi) {
  PackedParameters<T> packed;
  packed.copies = stride == 0 ? 1 : tasks;
  packed.stride = stride;
  if (packed_theta != nullptr) {
    packed.theta = std::shared_ptr<T>(const_cast<T*>(packed_theta), [](T*) {});
  }
  if (phi != nullptr) {
    packed.phi = memory_->take<T>(plan_.phi.packed_size());
    plan_.phi.pack(phi, packed.phi.get(), Share{});
  }
  return packed;
}

template <typename T>
void NativeProgram<T>::pack_theta(const void* theta, Index rows, void* packed, int threads) {
  const auto* from = static_cast<const T*>(theta);
  auto* to = static_cast<T*>(packed);
  for_each_unit(rows, threads, [&](const TeamMember& member, Index row) {
    plan_.theta.pack_row(from + row * plan_.theta.size(), to + row * plan_.theta.row_size(),
                         member.share);
  });
}

template <typename T>
void NativeProgram<T>::unpack_theta(const void* packed, Index rows, void* theta, int threads) {
  const auto* from = static_cast<const T*>(packed);
  auto* to = static_cast<T*>(theta);
  for_each_unit(rows, threads, [&](const TeamMember& member, Index row) {
    plan_.theta.unpack_row(from + row * plan_.theta.row_size(), to + row * plan_.theta.size(),
                           member.share);
  });
}

template <typename T>
void NativeProgram<T>::transpose_shared(PackedParameters<T>& parameters, Sources sources,
                                        int threads) {
  if ((sources & ~parameters.transposed_for) == 0) return;
  parameters.transposed_for |= sources;
  const auto of_group = [&](const ParameterGroup& group, const T* packed,
                            std::shared_ptr<T>& transposed) {
    if (packed == nullptr || group.transposed_size() == 0) return;
    if (transposed == nullptr) transposed = memory_->take<T>(group.transposed_size());
    for_each_unit(1, threads, [&](const TeamMember& member, Index) {
      group.transpose(*plan_.kernels, packed, parameters.transposed_for, transposed.get(),
                      member.share);
    });
  };
  if (parameters.copies == 1) {
    of_group(plan_.theta, parameters.theta.get(), parameters.theta_transposed);
  }
  of_group(plan_.phi, parameters.phi.get(), parameters.phi_transposed);
}

template <typename T>
std::shared_ptr<T> NativeProgram<T>::pack_buffers(const T* buffers) {
  std::shared_ptr<T> packed = memory_->take<T>(plan_.buffers_size);
  if (packed == nullptr) return nullptr;
  std::fill(packed.get(), packed.get() + plan_.buffers_size, T(0));
  for (const PackedBuffer& buffer : plan_.buffers) {
    std::copy(buffers + buffer.offset, buffers + buffer.offset + buffer.size,
              packed.get() + buffer.packed);
  }
  return packed;
}

template <typename T>
Index gradient_region_size(const Plan<T>& plan, const BatchPlan<T>& batch, Sources sources,
                           bool over_values) {
  const bool output_needs_it = (plan.storages[plan.output].depends & (kTheta | kPhi)) == 0;
  const bool with_input = (sources & kInput) != 0 || output_needs_it;
  if (with_input) return batch.gradient_size_with_input;
  return over_values ? batch.least_gradient_size : batch.gradient_size;
}

template <typename T>
void load_input(Run<T>& run, const T* x, T* out) {
  const Plan<T>& plan = run.plan;
  if (plan.input_from_torch.empty()) {
    const Range part = split(run.examples() * plan.input_size, run.share);
    std::copy(x + part.begin, x + part.end, out + part.begin);
  } else {
    run.kernels.rearrange(run.examples(), plan.input_from_torch, x, out, Moving::kWrite, run.share);
  }
  run.sync();
}

template <typename T>
void store_output(Run<T>& run, const T* from, T* y) {
  const Plan<T>& plan = run.plan;
  const Index size = run.examples() * plan.output_size;
  if (from == nullptr) {
    const Range part = split(size, run.share);
    std::fill(y + part.begin, y + part.end, T(0));
  } else {
    run.kernels.rearrange(run.examples(), plan.output_to_torch, from, y, Moving::kWrite, run.share);
  }
}

template <typename T>
T* begin_flow(Run<T>& run, Flow<T>& flow) {
  run.reset(flow);
  flow.value_written[run.plan.output] = 1;
  return run.place(flow, run.plan.output);
}

template <typename T>
void load_output_gradient(Run<T>& run, Flow<T>& flow, const T* gy) {
  const Plan<T>& plan = run.plan;
  run.kernels.rearrange(run.examples(), plan.output_from_torch, gy, begin_flow(run, flow),
                        Moving::kWrite, run.share);
  run.sync();
}

template <typename T>
void store_stats(const Run<T>& run, T* stats) {
  if (stats == nullptr || run.share.part != 0) return;
  for (const auto& op : run.plan.ops) {
    if (op->stats_size() == 0) continue;  // a norm without running statistics has no place here
    op->write_stats(run, stats);
    stats += op->stats_size();
  }
}

#define FASTMAML_INSTANTIATE(T)                                                               \
  template class GroupSums<T>;                                                                \
  template struct PackedParameters<T>;                                                        \
  template NativeProgram<T>::NativeProgram(const ProgramSpec&);                               \
  template ProgramSizes NativeProgram<T>::sizes() const;                                      \
  template int NativeProgram<T>::useful_threads(Index, Index, Index, int) const;              \
  template std::shared_ptr<const BatchPlan<T>> NativeProgram<T>::batch(Index);                \
  template PackedParameters<T> NativeProgram<T>::pack(const T*, Index, Index, const T*, int); \
  template PackedParameters<T> NativeProgram<T>::pack_phi(const T*, Index, Index, const T*);  \
  template void NativeProgram<T>::pack_theta(const void*, Index, void*, int);                 \
  template void NativeProgram<T>::unpack_theta(const void*, Index, void*, int);               \
  template void NativeProgram<T>::transpose_shared(PackedParameters<T>&, Sources, int);       \
  template std::shared_ptr<T> NativeProgram<T>::pack_buffers(const T*);                       \
  template Index gradient_region_size<T>(const Plan<T>&, const BatchPlan<T>&, Sources, bool); \
  template void load_input<T>(Run<T>&, const T*, T*);                                         \
  template void store_output<T>(Run<T>&, const T*, T*);                                       \
  template T* begin_flow<T>(Run<T>&, Flow<T>&);                                               \
  template void load_output_gradient<T>(Run<T>&, Flow<T>&, const T*);                         \
  template void store_stats<T>(const Run<T>&, T*);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)
#undef FASTMAML_INSTANTIATE

std::shared_ptr<Program> make_program(const ProgramSpec& spec) {
  if (spec.dtype == DType::kFloat64) return std::make_shared<NativeProgram<double>>(spec);
  return std::make_shared<NativeProgram<float>>(spec);
}

}  // namespace fastmaml
