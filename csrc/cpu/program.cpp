// The four operations, one task per team.
#include "cpu/program.h"

#include <stdexcept>
#include <string>

#include "cpu/program_gradients.h"

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

// A run over what the context of a task holds.
template <typename T>
Run<T> context_run(const Plan<T>& plan, const NativeContext<T>& context, const TeamMember& member,
                   Index task) {
  Run<T> run(plan, *context.batch, member);
  run.values = context.values[task].get();
  run.input = run.values + context.batch->value[0];
  run.weights = context.weights.of(task);
  run.far = context.tasks > 1;
  return run;
}

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
    run.weights = context->weights.of(task);
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
  const GradientOutput<T> output(*this, context.tasks, batch.examples, context.packed,
                                 {args.gtheta, args.gshared, args.gx, false, args.threads});
  auto gradient = std::make_shared<NativeGradient<T>>();
  gradient->context = &context;
  gradient->sources = output.sources();
  const TaskTransposes<T> transposes(*this, context.weights, gradient->sources, output.teams(),
                                     args.threads);
  const Index frames = args.keep ? context.tasks : output.teams();
  gradient->regions =
      take_regions<T>(*memory_, frames, gradient_region_size(plan_, batch, gradient->sources));
  const auto* gy = static_cast<const T*>(args.gy);
  output.for_each_task([&](const TeamMember& member, Index task) {
    Run<T> run = context_run(plan_, context, member, task);
    transposes.bind(run, run.weights);
    output.prepare(run.first, member, task);
    run.first.region = gradient->regions[args.keep ? task : member.team].get();
    load_output_gradient(run, run.first, gy + task * batch.examples * plan_.output_size);
    output.add_to_sums(run.first, task);
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
    run.directions = tangent->directions.of(task);
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
  const GradientOutput<T> output(
      *this, context.tasks, batch.examples, context.packed,
      {args.dgtheta, args.dgshared, args.dgx, args.sum_theta, args.threads});
  const TaskTransposes<T> transposes(*this, context.weights, output.sources(), output.teams(),
                                     args.threads);
  const TaskTransposes<T> directions(*this, tangent.directions, output.sources(), output.teams(),
                                     args.threads);
  const auto regions = take_regions<T>(*memory_, output.teams(),
                                       gradient_region_size(plan_, batch, output.sources()));
  const auto* dgy = static_cast<const T*>(args.dgy);
  output.for_each_task([&](const TeamMember& member, Index task) {
    Run<T> run = context_run(plan_, context, member, task);
    run.tangents = tangent.regions[task].get();
    run.input_tangent = run.tangent_out(0);
    run.tangent_sources = tangent.sources;
    run.directions = tangent.directions.of(task);
    transposes.bind(run, run.weights);
    directions.bind(run, run.directions);
    run.first.region = gradient.regions[task].get();
    run.first.sources = gradient.sources;
    output.prepare(run.second, member, task);
    run.second.region = regions[member.team].get();
    if (dgy == nullptr) {
      run.reset(run.second);
    } else {
      load_output_gradient(run, run.second, dgy + task * batch.examples * plan_.output_size);
    }
    output.add_to_sums(run.second, task);
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
