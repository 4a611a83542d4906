// The four operations, one task per team.
#include "cpu/program.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastmaml {

namespace {

template <typename T>
struct NativeContext final : Context {
  const void* program = nullptr;
  std::shared_ptr<const BatchPlan<T>> batch;
  Index tasks = 0;
  bool packed = false;  // the caller's rows of theta are
  PackedParameters<T> weights;
  std::vector<std::shared_ptr<T>> values;  // by task, the input among them
};

template <typename T>
struct NativeGradient final : Gradient {
  const Context* context = nullptr;
  Sources sources = 0;
  std::vector<std::shared_ptr<T>> regions;  // by task
};

template <typename T>
struct NativeTangent final : Tangent {
  const Context* context = nullptr;
  Sources sources = 0;
  PackedParameters<T> directions;
  std::vector<std::shared_ptr<T>> regions;  // by task
};

template <typename T>
NativeContext<T>& native(Context& context, const void* program) {
  auto* found = dynamic_cast<NativeContext<T>*>(&context);
  if (found == nullptr || found->program != program) {
    throw std::invalid_argument("context must come from this program's forward");
  }
  return *found;
}

template <typename State, typename Base>
State& belonging(Base& base, const Context& context, const char* name) {
  auto* found = dynamic_cast<State*>(&base);
  if (found == nullptr || found->context != &context) {
    throw std::invalid_argument(std::string(name) + " must come from the same context");
  }
  return *found;
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Sources sources_of(const void* theta, const void* phi, const void* input) {
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

// A run over what the context of a task holds.
template <typename T>
Run<T> context_run(const Plan<T>& plan, const NativeContext<T>& context, const TeamMember& member,
                   Index task) {
  Run<T> run(plan, *context.batch, member);
  run.values = context.values[task].get();
  run.input = run.values + context.batch->value[0];
  run.weights = context.weights.of(plan, task);
  return run;
}

// Parameter and input gradients of all tasks on their way out. `backward` leaves them in a flow.
template <typename T>
class GradientOutput {
 public:
  GradientOutput(const NativeProgram<T>& program, const NativeContext<T>& context, void* gtheta,
                 void* gphi, void* gx, int threads)
      : plan_(program.plan()),
        memory_(program.memory()),
        groups_(context.tasks, plan_.phi.packed_size() * static_cast<Index>(sizeof(T))),
        tasks_(context.tasks),
        examples_(context.batch->examples),
        packed_(context.packed),
        gtheta_(static_cast<T*>(gtheta)),
        gphi_(static_cast<T*>(gphi)),
        gx_(static_cast<T*>(gx)),
        threads_(threads) {
    if (gphi_ != nullptr) {
      phi_sums_ = GroupSums<T>(memory_, groups_.count(), plan_.phi.packed_size());
    }
    const int teams = team_count(units(), threads);
    const bool rearranged = gtheta_ != nullptr && !packed_;
    theta_ = take_regions<T>(memory_, teams, rearranged ? plan_.theta.packed_size() : 0);
    phi_ = take_regions<T>(memory_, teams, gphi_ == nullptr ? 0 : plan_.phi.packed_size());
  }

  Sources sources() const { return sources_of(gtheta_, gphi_, gx_); }
  // Tasks are taken one by one, or in the groups that their sum needs.
  Index units() const { return gphi_ == nullptr ? tasks_ : groups_.count(); }

  // Calls body(member, task), in order within each unit.
  template <typename Body>
  void for_each_task(const Body& body) const {
    for_each_unit(units(), threads_, [&](const TeamMember& member, Index unit) {
      const Range tasks = gphi_ == nullptr ? Range{unit, unit + 1} : groups_.tasks(unit);
      for (Index task = tasks.begin; task < tasks.end; ++task) body(member, task);
    });
  }

  void prepare(Flow<T>& flow, const TeamMember& member, Index task) const {
    flow.theta = packed_ ? packed_row(task) : theta_[member.team].get();
    flow.phi = phi_[member.team].get();
    flow.sources = sources();
  }

  void store(Run<T>& run, const Flow<T>& flow, Index task) const {
    if (packed_) {
      if (gtheta_ != nullptr && run.share.part == 0) plan_.theta.clear_unused(packed_row(task));
    } else if (gtheta_ != nullptr) {
      plan_.theta.unpack(flow.theta, T(1), gtheta_ + task * plan_.theta.size(), run.share);
    }
    if (gphi_ != nullptr) add_phi(run, flow, task);
    if (gx_ != nullptr) store_input(run, flow, gx_ + task * examples_ * plan_.input_size);
    run.sync();
  }

  void finish() const {
    if (gphi_ == nullptr) return;
    if (plan_.phi.packed_size() == 0) {
      std::fill(gphi_, gphi_ + plan_.phi.size(), T(0));
      return;
    }
    plan_.phi.unpack(phi_sums_.total(*plan_.kernels, threads_), T(1), gphi_, Share{});
  }

 private:
  T* packed_row(Index task) const {
    return gtheta_ == nullptr ? nullptr : gtheta_ + task * plan_.theta.row_size();
  }

  void add_phi(Run<T>& run, const Flow<T>& flow, Index task) const {
    Index group = 0;
    while (groups_.tasks(group).end <= task) ++group;
    run.kernels.axpby(plan_.phi.packed_size(), T(1), flow.phi, T(0), nullptr, phi_sums_.row(group),
                      task != groups_.tasks(group).begin, run.share);
  }

  void store_input(Run<T>& run, const Flow<T>& flow, T* gx) const {
    const T* from = run.arrived(flow, 0);
    if (from == nullptr) {
      const Range part = split(examples_ * plan_.input_size, run.share);
      std::fill(gx + part.begin, gx + part.end, T(0));
      return;
    }
    run.kernels.gather(examples_, plan_.storages[0].gradient_size, plan_.input_size,
                       plan_.input_gradient_to_torch.data(), from, gx, false, run.share);
  }

  const Plan<T>& plan_;
  ArenaPool& memory_;
  TaskGroups groups_;
  Index tasks_, examples_;
  bool packed_;
  T *gtheta_, *gphi_, *gx_;
  int threads_;
  GroupSums<T> phi_sums_;
  std::vector<std::shared_ptr<T>> theta_, phi_;  // by team
};

template <typename T>
void check_forward(const Plan<T>& plan, const ForwardArgs& args) {
  require(args.tasks > 0, "tasks must be at least 1: there is nothing to do without a task");
  require(args.examples > 0, "examples must be at least 1");
  require(args.x != nullptr && args.y != nullptr, "x and y must be given");
  require(plan.sizes.theta == 0 || args.theta != nullptr, "theta must be given");
  require(plan.sizes.shared == 0 || args.shared != nullptr, "shared must be given");
  require(plan.sizes.buffers == 0 || args.buffers != nullptr, "buffers must be given");
}

}  // namespace

template <typename T>
std::shared_ptr<Context> NativeProgram<T>::forward(const ForwardArgs& args) {
  check_forward(plan_, args);
  std::lock_guard<std::mutex> lock(call_mutex_);
  auto context = std::make_shared<NativeContext<T>>();
  context->program = this;
  context->batch = batch(args.examples);
  context->tasks = args.tasks;
  context->packed = args.packed;
  context->weights = parameters(args.packed, static_cast<const T*>(args.theta), args.theta_stride,
                                args.tasks, static_cast<const T*>(args.shared), args.threads);
  const BatchPlan<T>& batch = *context->batch;
  const std::shared_ptr<T> buffers = pack_buffers(static_cast<const T*>(args.buffers));
  const Index frames = args.keep ? args.tasks : team_count(args.tasks, args.threads);
  context->values = take_regions<T>(*memory_, frames, batch.value_size);
  const auto* x = static_cast<const T*>(args.x);
  auto* y = static_cast<T*>(args.y);
  auto* stats = static_cast<T*>(args.stats);
  for_each_unit(args.tasks, args.threads, [&](const TeamMember& member, Index task) {
    Run<T> run(plan_, batch, member);
    run.values = context->values[args.keep ? task : member.team].get();
    run.input = run.values + batch.value[0];
    run.weights = context->weights.of(plan_, task);
    run.buffers = buffers.get();
    load_input(run, x + task * args.examples * plan_.input_size, run.value_out(0));
    run_forward(run);
    store_output(run, run.value(plan_.output), y + task * args.examples * plan_.output_size);
    store_stats(run, stats == nullptr ? nullptr : stats + task * plan_.sizes.stats);
    run.sync();
  });
  return args.keep ? context : nullptr;
}

template <typename T>
std::shared_ptr<Gradient> NativeProgram<T>::backward(Context& base, const BackwardArgs& args) {
  require(args.gy != nullptr, "gy must be given");
  std::lock_guard<std::mutex> lock(call_mutex_);
  NativeContext<T>& context = native<T>(base, this);
  const BatchPlan<T>& batch = *context.batch;
  const GradientOutput<T> output(*this, context, args.gtheta, args.gshared, args.gx, args.threads);
  auto gradient = std::make_shared<NativeGradient<T>>();
  gradient->context = &context;
  gradient->sources = output.sources();
  transpose(context.weights, gradient->sources, args.threads);
  const Index frames = args.keep ? context.tasks : team_count(output.units(), args.threads);
  gradient->regions =
      take_regions<T>(*memory_, frames, gradient_region_size(plan_, batch, gradient->sources));
  const auto* gy = static_cast<const T*>(args.gy);
  output.for_each_task([&](const TeamMember& member, Index task) {
    Run<T> run = context_run(plan_, context, member, task);
    output.prepare(run.first, member, task);
    run.first.region = gradient->regions[args.keep ? task : member.team].get();
    load_output_gradient(run, run.first, gy + task * batch.examples * plan_.output_size);
    run_backward(run, run.first);
    output.store(run, run.first, task);
  });
  output.finish();
  return args.keep ? gradient : nullptr;
}

template <typename T>
std::shared_ptr<Tangent> NativeProgram<T>::tangent(Context& base, const TangentArgs& args) {
  require(args.dy != nullptr, "dy must be given");
  std::lock_guard<std::mutex> lock(call_mutex_);
  NativeContext<T>& context = native<T>(base, this);
  const BatchPlan<T>& batch = *context.batch;
  auto tangent = std::make_shared<NativeTangent<T>>();
  tangent->context = &context;
  tangent->sources = sources_of(args.dtheta, args.dshared, args.dx);
  tangent->directions =
      parameters(context.packed, static_cast<const T*>(args.dtheta), args.dtheta_stride,
                 context.tasks, static_cast<const T*>(args.dshared), args.threads);
  const Index frames = args.keep ? context.tasks : team_count(context.tasks, args.threads);
  tangent->regions = take_regions<T>(*memory_, frames, batch.tangent_size);
  const auto* dx = static_cast<const T*>(args.dx);
  auto* dy = static_cast<T*>(args.dy);
  for_each_unit(context.tasks, args.threads, [&](const TeamMember& member, Index task) {
    Run<T> run = context_run(plan_, context, member, task);
    run.tangents = tangent->regions[args.keep ? task : member.team].get();
    run.input_tangent = run.tangent_out(0);
    run.tangent_sources = tangent->sources;
    run.directions = tangent->directions.of(plan_, task);
    if (dx != nullptr) {
      load_input(run, dx + task * batch.examples * plan_.input_size, run.tangent_out(0));
    }
    run_tangent(run);
    store_output(run, run.tangent(plan_.output), dy + task * batch.examples * plan_.output_size);
    run.sync();
  });
  return args.keep ? tangent : nullptr;
}

template <typename T>
void NativeProgram<T>::backward_tangent(Context& base, Gradient& base_gradient,
                                        Tangent& base_tangent, const BackwardTangentArgs& args) {
  std::lock_guard<std::mutex> lock(call_mutex_);
  NativeContext<T>& context = native<T>(base, this);
  auto& gradient = belonging<NativeGradient<T>>(base_gradient, context, "gradient");
  auto& tangent = belonging<NativeTangent<T>>(base_tangent, context, "tangent");
  require((tangent.sources & ~gradient.sources) == 0,
          "backward must have been asked for the gradient (gtheta, gshared, gx) of everything that "
          "the tangent moves");
  const BatchPlan<T>& batch = *context.batch;
  const GradientOutput<T> output(*this, context, args.dgtheta, args.dgshared, args.dgx,
                                 args.threads);
  transpose(context.weights, output.sources(), args.threads);
  transpose(tangent.directions, output.sources(), args.threads);
  const auto regions = take_regions<T>(*memory_, team_count(output.units(), args.threads),
                                       gradient_region_size(plan_, batch, output.sources()));
  const auto* dgy = static_cast<const T*>(args.dgy);
  output.for_each_task([&](const TeamMember& member, Index task) {
    Run<T> run = context_run(plan_, context, member, task);
    run.tangents = tangent.regions[task].get();
    run.input_tangent = run.tangent_out(0);
    run.tangent_sources = tangent.sources;
    run.directions = tangent.directions.of(plan_, task);
    run.first.region = gradient.regions[task].get();
    run.first.sources = gradient.sources;
    output.prepare(run.second, member, task);
    run.second.region = regions[member.team].get();
    if (dgy == nullptr) {
      run.reset(run.second);
    } else {
      load_output_gradient(run, run.second, dgy + task * batch.examples * plan_.output_size);
    }
    run_backward_tangent(run);
    output.store(run, run.second, task);
  });
  output.finish();
}

#define FASTMAML_INSTANTIATE(T)                                                                 \
  template std::shared_ptr<Context> NativeProgram<T>::forward(const ForwardArgs&);              \
  template std::shared_ptr<Gradient> NativeProgram<T>::backward(Context&, const BackwardArgs&); \
  template std::shared_ptr<Tangent> NativeProgram<T>::tangent(Context&, const TangentArgs&);    \
  template void NativeProgram<T>::backward_tangent(Context&, Gradient&, Tangent&,               \
                                                   const BackwardTangentArgs&);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace fastmaml
