// fastmaml._core: with the other bindings* the only file that knows Python. Tensors arrive as
// data_ptr() integers.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_limit.h"
#include "fastmaml/core.h"
#include "fastmaml/device.h"

namespace py = pybind11;

namespace fastmaml {

namespace {

const NamedValues<DType> kDTypes = {{"float32", DType::kFloat32}, {"float64", DType::kFloat64}};
const NamedValues<TaskLoss> kLosses = {{"cross_entropy", TaskLoss::kCrossEntropy},
                                       {"mse", TaskLoss::kMeanSquaredError},
                                       {"mean", TaskLoss::kMean}};

Attribute attribute(const std::string& name, const py::handle& value) {
  if (py::isinstance<py::bool_>(value)) return value.cast<bool>();
  if (py::isinstance<py::int_>(value)) return value.cast<Index>();
  if (py::isinstance<py::float_>(value)) return value.cast<double>();
  if (py::isinstance<py::str>(value)) return value.cast<std::string>();
  if (py::isinstance<py::tuple>(value) || py::isinstance<py::list>(value)) {
    return value.cast<std::vector<Index>>();
  }
  throw py::type_error("attribute " + name + " must be a bool, int, float, str or tuple of ints");
}

OpSpec op_spec(const py::dict& dict) {
  OpSpec op;
  for (const auto& item : dict) {
    const auto name = item.first.cast<std::string>();
    if (name == "kind") {
      op.kind = item.second.cast<std::string>();
    } else if (name == "inputs") {
      op.inputs = item.second.cast<std::vector<int>>();
    } else if (name == "output") {
      op.output = item.second.cast<int>();
    } else if (name == "params") {
      op.params = item.second.cast<std::vector<int>>();
    } else if (name == "buffers") {
      op.buffers = item.second.cast<std::vector<int>>();
    } else if (!item.second.is_none()) {
      op.attributes.emplace(name, attribute(name, item.second));
    }
  }
  return op;
}

std::shared_ptr<Program> program(const std::string& dtype, std::vector<Shape> values,
                                 const std::vector<py::dict>& ops,
                                 const std::vector<py::dict>& slots, std::vector<Shape> buffers,
                                 int output, Index theta_size, Index shared_size) {
  ProgramSpec spec;
  spec.dtype = dtype_named(dtype);
  spec.values = std::move(values);
  for (const py::dict& op : ops) spec.ops.push_back(op_spec(op));
  for (const py::dict& slot : slots) {
    spec.slots.push_back({slot["shape"].cast<Shape>(), slot["adapted"].cast<bool>(),
                          slot["offset"].cast<Index>(), slot["swapped"].cast<bool>()});
  }
  spec.buffers = std::move(buffers);
  spec.output = output;
  spec.theta_size = theta_size;
  spec.shared_size = shared_size;
  py::gil_scoped_release unlocked;
  return make_program(spec);
}

std::shared_ptr<Context> forward(Program& self, std::uintptr_t theta, Index theta_stride,
                                 std::uintptr_t shared, std::uintptr_t buffers, std::uintptr_t x,
                                 Index tasks, Index examples, std::uintptr_t y,
                                 std::uintptr_t stats, int threads, bool keep, bool packed) {
  const CallThreads on(threads);
  return self.forward({in(theta), theta_stride, in(shared), in(buffers), in(x), tasks, examples,
                       out(y), out(stats), on.count(), keep, packed});
}

void pack_theta(Program& self, std::uintptr_t theta, Index rows, std::uintptr_t packed,
                int threads) {
  self.pack_theta(in(theta), rows, out(packed), CallThreads(threads).count());
}

void unpack_theta(Program& self, std::uintptr_t packed, Index rows, std::uintptr_t theta,
                  int threads) {
  self.unpack_theta(in(packed), rows, out(theta), CallThreads(threads).count());
}

std::shared_ptr<Gradient> backward(Program& self, Context& context, std::uintptr_t gy,
                                   std::uintptr_t gtheta, std::uintptr_t gshared, std::uintptr_t gx,
                                   int threads, bool keep) {
  const CallThreads on(threads);
  return self.backward(context, {in(gy), out(gtheta), out(gshared), out(gx), on.count(), keep});
}

std::shared_ptr<Tangent> tangent(Program& self, Context& context, std::uintptr_t dtheta,
                                 Index dtheta_stride, std::uintptr_t dshared, std::uintptr_t dx,
                                 std::uintptr_t dy, int threads, bool keep) {
  const CallThreads on(threads);
  return self.tangent(context,
                      {in(dtheta), dtheta_stride, in(dshared), in(dx), out(dy), on.count(), keep});
}

void backward_tangent(Program& self, Context& context, Gradient& gradient, Tangent& tangent,
                      std::uintptr_t dgy, std::uintptr_t dgtheta, std::uintptr_t dgshared,
                      std::uintptr_t dgx, int threads, bool sum_theta) {
  const CallThreads on(threads);
  self.backward_tangent(context, gradient, tangent,
                        {in(dgy), out(dgtheta), out(dgshared), out(dgx), on.count(), sum_theta});
}

using Coefficient = std::tuple<std::uintptr_t, Index, bool, std::uintptr_t>;

InnerUpdateArgs inner_update(bool momentum, bool nesterov, bool second_moment, bool normalise_first,
                             double clip_norm, double clip_value,
                             const std::vector<Coefficient>& coefficients) {
  InnerUpdateArgs update{momentum,   nesterov, second_moment, normalise_first, clip_norm,
                         clip_value, {}};
  for (const auto& [values, rows, each, gradient] : coefficients) {
    update.coefficients.push_back({in(values), rows, each, out(gradient)});
  }
  return update;
}

void meta_step(Program& self, std::uintptr_t theta, Index theta_stride, std::uintptr_t shared,
               std::uintptr_t buffers, std::uintptr_t support_x, std::uintptr_t support_y,
               Index support_examples, std::uintptr_t query_x, std::uintptr_t query_y,
               Index query_examples, Index tasks, Index steps, const std::string& loss,
               bool first_order, double rate, Index support_batches, std::uintptr_t rates,
               Index rate_steps, const InnerUpdateArgs* update, std::uintptr_t losses,
               std::uintptr_t mean_loss, std::uintptr_t gtheta, std::uintptr_t gshared,
               std::uintptr_t grates, std::uintptr_t stats, std::uintptr_t adapted,
               std::uintptr_t predictions, int threads, std::size_t memory_budget_bytes) {
  MetaStepArgs args;
  args.theta = in(theta);
  args.theta_stride = theta_stride;
  args.shared = in(shared);
  args.buffers = in(buffers);
  args.support_x = in(support_x);
  args.support_y = in(support_y);
  args.support_examples = support_examples;
  args.support_batches = support_batches;
  args.query_x = in(query_x);
  args.query_y = in(query_y);
  args.query_examples = query_examples;
  args.tasks = tasks;
  args.steps = steps;
  args.loss = loss_named(loss);
  args.first_order = first_order;
  args.rate = rate;
  args.rates = in(rates);
  args.rate_steps = rate_steps;
  args.update = update;
  args.losses = out(losses);
  args.mean_loss = out(mean_loss);
  args.gtheta = out(gtheta);
  args.gshared = out(gshared);
  args.grates = out(grates);
  args.stats = out(stats);
  args.adapted = out(adapted);
  args.predictions = out(predictions);
  args.memory_budget_bytes = memory_budget_bytes;
  py::gil_scoped_release unlocked;
  const CallThreads on(threads);
  args.threads = on.count();
  self.meta_step(args);
}

void adjoint_of_step(const std::string& dtype, std::uintptr_t cotangent, Index tasks, Index size,
                     double rate, std::uintptr_t dgradient, std::uintptr_t sum, int threads) {
  const CallThreads on(threads);
  step_adjoint(
      {dtype_named(dtype), in(cotangent), tasks, size, rate, out(dgradient), out(sum), on.count()});
}

void fold(const std::string& dtype, std::uintptr_t rows, Index calls, Index width,
          const std::vector<std::pair<std::uintptr_t, Index>>& buffers,
          const std::vector<std::uintptr_t>& counts, double momentum) {
  FoldArgs args{dtype_named(dtype), in(rows), calls, width, {}, {}, momentum};
  for (const auto& [data, size] : buffers) args.buffers.push_back({out(data), size});
  for (const std::uintptr_t count : counts) args.counts.push_back(pointer<std::int64_t>(count));
  fold_statistics(args);
}

bool same_bytes(std::uintptr_t a, std::uintptr_t b, std::size_t count) {
  return count == 0 || std::memcmp(in(a), in(b), count) == 0;
}

py::dict info() {
  py::dict facts;
  const Kernels<float>& table = kernels<float>();
  facts["version"] = FASTMAML_VERSION;
  facts["isa"] = table.isa;
  facts["isas"] = runnable_isas();
  facts["lanes"] = table.lanes;
  facts["cuda"] = cuda_kernels() != nullptr;
  return facts;
}

}  // namespace

DType dtype_named(const std::string& name) { return named("dtype", name, kDTypes); }
TaskLoss loss_named(const std::string& name) { return named("loss", name, kLosses); }

PYBIND11_MODULE(_core, module) {
  module.doc() = "The native core of fastmaml: task-batched programs on raw pointers.";
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  py::class_<Context, std::shared_ptr<Context>>(module, "Context");
  py::class_<Gradient, std::shared_ptr<Gradient>>(module, "Gradient");
  py::class_<Tangent, std::shared_ptr<Tangent>>(module, "Tangent");

  py::class_<InnerUpdateArgs>(module, "InnerUpdate")
      .def(py::init(&inner_update), py::kw_only(), py::arg("momentum"), py::arg("nesterov"),
           py::arg("second_moment"), py::arg("normalise_first"), py::arg("clip_norm"),
           py::arg("clip_value"), py::arg("coefficients"));

  py::class_<Program, std::shared_ptr<Program>>(module, "Program")
      .def(py::init(&program), py::arg("dtype"), py::arg("values"), py::arg("ops"),
           py::arg("slots"), py::arg("buffers"), py::arg("output"), py::kw_only(),
           py::arg("theta_size") = -1, py::arg("shared_size") = -1)
      .def_property_readonly("theta_size", [](const Program& p) { return p.sizes().theta; })
      .def_property_readonly("stats_size", [](const Program& p) { return p.sizes().stats; })
      .def_property_readonly("packed_theta_size",
                             [](const Program& p) { return p.sizes().packed_theta; })
      .def_property_readonly("packing", &Program::packing)
      .def("pack_theta", &pack_theta, Unlocked(), py::kw_only(), py::arg("theta"), py::arg("rows"),
           py::arg("packed"), py::arg("threads") = 1)
      .def("unpack_theta", &unpack_theta, Unlocked(), py::kw_only(), py::arg("packed"),
           py::arg("rows"), py::arg("theta"), py::arg("threads") = 1)
      .def("forward", &forward, Unlocked(), py::kw_only(), py::arg("theta"),
           py::arg("theta_stride"), py::arg("shared"), py::arg("buffers"), py::arg("x"),
           py::arg("tasks"), py::arg("examples"), py::arg("y"), py::arg("stats") = 0,
           py::arg("threads") = 1, py::arg("keep") = true, py::arg("packed") = false)
      .def("backward", &backward, Unlocked(), py::kw_only(), py::arg("context"), py::arg("gy"),
           py::arg("gtheta"), py::arg("gshared") = 0, py::arg("gx") = 0, py::arg("threads") = 1,
           py::arg("keep") = true)
      .def("tangent", &tangent, Unlocked(), py::kw_only(), py::arg("context"), py::arg("dtheta"),
           py::arg("dtheta_stride"), py::arg("dshared") = 0, py::arg("dx") = 0, py::arg("dy"),
           py::arg("threads") = 1, py::arg("keep") = true)
      .def("backward_tangent", &backward_tangent, Unlocked(), py::kw_only(), py::arg("context"),
           py::arg("gradient"), py::arg("tangent"), py::arg("dgy"), py::arg("dgtheta"),
           py::arg("dgshared") = 0, py::arg("dgx") = 0, py::arg("threads") = 1,
           py::arg("sum_theta") = false)
      .def("useful_threads", &Program::useful_threads, py::arg("tasks"), py::arg("examples"),
           py::arg("passes"), py::arg("threads"))
      .def("suits_lanes", &Program::suits_lanes, py::arg("tasks"), py::arg("examples"))
      .def("meta_step", &meta_step, py::kw_only(), py::arg("theta"), py::arg("theta_stride"),
           py::arg("shared"), py::arg("buffers"), py::arg("support_x"), py::arg("support_y"),
           py::arg("support_examples"), py::arg("query_x"), py::arg("query_y"),
           py::arg("query_examples"), py::arg("tasks"), py::arg("steps"), py::arg("loss"),
           py::arg("first_order"), py::arg("rate"), py::arg("support_batches") = 1,
           py::arg("rates") = 0, py::arg("rate_steps") = 1, py::arg("update") = nullptr,
           py::arg("losses") = 0, py::arg("mean_loss") = 0, py::arg("gtheta") = 0,
           py::arg("gshared") = 0, py::arg("grates") = 0, py::arg("stats") = 0,
           py::arg("adapted") = 0, py::arg("predictions") = 0, py::arg("threads") = 1,
           py::arg("memory_budget_bytes") = std::size_t{1} << 30);

  bind_memory(module);
  bind_modules(module);
  bind_sampler(module);
  bind_device(module);
  module.def("info", &info, "What was built, and what this processor runs.");
  module.def("step_adjoint", &adjoint_of_step, Unlocked(), py::kw_only(), py::arg("dtype"),
             py::arg("cotangent"), py::arg("tasks"), py::arg("size"), py::arg("rate"),
             py::arg("dgradient"), py::arg("sum"), py::arg("threads") = 1,
             "Back through a gradient step of all tasks from a theta that they share.");
  module.def("fold_statistics", &fold, py::kw_only(), py::arg("dtype"), py::arg("rows"),
             py::arg("calls"), py::arg("width"), py::arg("buffers"), py::arg("counts"),
             py::arg("momentum"), "Fold what batch norms report into their running statistics.");
  module.def("same_bytes", &same_bytes, py::arg("a"), py::arg("b"), py::arg("count"), Unlocked(),
             "Whether two pieces of memory hold the same.");
  module.def("fma_peak", &fma_peak, py::arg("threads") = 1, Unlocked(),
             "Measured GFLOP/s of float32 fused multiply-adds in registers.");
  module.def("handover_ns", &handover_ns, Unlocked(),
             "Measured nanoseconds for a cache line to go to another core and back.");
}

}  // namespace fastmaml
