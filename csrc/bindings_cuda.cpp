// fastmaml._core.DeviceKernels: the kernels of the GPU, and the same ones on the host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "cpu/activation_names.h"
#include "fastmaml/device.h"

namespace py = pybind11;

namespace fastmaml {

namespace {

void draw_episodes(const DeviceKernels& kernels, std::uintptr_t images, const std::string& pixel,
                   Index channels, Index plane, std::uintptr_t factors, std::uintptr_t shifts,
                   std::uintptr_t members, std::uintptr_t starts, std::uintptr_t counts,
                   Index classes, Index ways, Index shots, Index queries, Index tasks,
                   const std::string& rotations, Index first_task, std::uintptr_t support_x,
                   std::uintptr_t query_x, std::uint64_t seed, std::uint64_t batch,
                   std::uintptr_t place, const Stream& stream) {
  EpisodeBatch args;
  args.images = in(images);
  args.pixel = pixel_named(pixel);
  args.channels = channels;
  args.plane = plane;
  args.factors = in(factors);
  args.shifts = in(shifts);
  args.members = pointer<const Index>(members);
  args.starts = pointer<const Index>(starts);
  args.counts = pointer<const Index>(counts);
  args.classes = classes;
  args.ways = ways;
  args.shots = shots;
  args.queries = queries;
  args.tasks = tasks;
  args.rotations = rotations_named(rotations);
  args.first_task = first_task;
  args.support_x = out(support_x);
  args.query_x = out(query_x);
  args.seed = seed;
  args.batch = batch;
  args.place = pointer<std::uint64_t>(place);
  py::gil_scoped_release unlocked;
  kernels.draw_episodes(args, stream);
}

void update(const DeviceKernels& kernels, const std::string& dtype, std::uintptr_t theta,
            Index theta_stride, std::uintptr_t gradient, double rate, std::uintptr_t rates,
            bool per_parameter, std::uintptr_t moved, Index tasks, Index size,
            const Stream& stream) {
  kernels.update({dtype_named(dtype), in(theta), theta_stride, in(gradient),
                  RateTerm{rate, in(rates), per_parameter}, out(moved), tasks, size},
                 stream);
}

void update_adjoint(const DeviceKernels& kernels, const std::string& dtype,
                    std::uintptr_t cotangent, std::uintptr_t gradient, double rate,
                    std::uintptr_t rates, bool per_parameter, std::uintptr_t dgradient,
                    std::uintptr_t drates, Index tasks, Index size, const Stream& stream) {
  kernels.update_adjoint(
      {dtype_named(dtype), in(cotangent), in(gradient), RateTerm{rate, in(rates), per_parameter},
       out(dgradient), out(drates), tasks, size},
      stream);
}

using LayerTuple = std::tuple<Index, Index, Index, Index, std::string, double, double>;

// A network whose meta-steps run in one launch.
class Mlp {
 public:
  Mlp(const DeviceKernels& kernels, const std::string& dtype, const std::vector<LayerTuple>& layers,
      Index theta_size)
      : kernels_(kernels), dtype_(dtype_named(dtype)), theta_size_(theta_size) {
    for (const auto& [inputs, outputs, weight, bias, name, alpha, beta] : layers) {
      const auto function = activation_named(name);
      if (!name.empty() && !function) throw py::value_error("no activation '" + name + "'");
      layers_.push_back({inputs, outputs, weight, bias, function ? static_cast<int>(*function) : -1,
                         alpha, beta});
    }
  }

  Index shared_bytes(Index support_examples, Index query_examples) const {
    MlpMetaStep args = empty();
    args.support_examples = support_examples;
    args.query_examples = query_examples;
    return kernels_.mlp_shared_bytes(args);
  }

  Index scratch_bytes(Index tasks, Index steps, bool first_order, Index rate_steps, bool gradient,
                      bool rates_gradient) const {
    MlpMetaStep args = empty();
    args.tasks = tasks;
    args.steps = steps;
    args.first_order = first_order;
    args.rate_steps = rate_steps;
    args.gradient = gradient;
    args.rates_gradient = rates_gradient;
    return kernels_.mlp_scratch_bytes(args);
  }

  void meta_step(std::uintptr_t theta, std::uintptr_t support_x, std::uintptr_t support_y,
                 Index support_examples, Index support_batches, std::uintptr_t query_x,
                 std::uintptr_t query_y, Index query_examples, Index tasks, Index steps,
                 const std::string& loss, bool first_order, double rate, std::uintptr_t rates,
                 Index rate_steps, std::uintptr_t losses, std::uintptr_t mean_loss,
                 std::uintptr_t gtheta, std::uintptr_t grates, std::uintptr_t adapted,
                 std::uintptr_t predictions, std::uintptr_t scratch, std::uintptr_t arrived,
                 const Stream& stream) const {
    MlpMetaStep args = empty();
    args.theta = in(theta);
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
    args.losses = out(losses);
    args.mean_loss = out(mean_loss);
    args.gradient = gtheta != 0;
    args.rates_gradient = grates != 0;
    args.gtheta = out(gtheta);
    args.grates = out(grates);
    args.adapted = out(adapted);
    args.predictions = out(predictions);
    args.scratch = out(scratch);
    args.arrived = pointer<std::uint64_t>(arrived);
    py::gil_scoped_release unlocked;
    kernels_.mlp_meta_step(args, stream);
  }

 private:
  MlpMetaStep empty() const {
    MlpMetaStep args;
    args.dtype = dtype_;
    args.layers = layers_.data();
    args.depth = static_cast<Index>(layers_.size());
    args.theta_size = theta_size_;
    return args;
  }

  const DeviceKernels& kernels_;
  DType dtype_;
  std::vector<MlpLayer> layers_;
  Index theta_size_;
};

}  // namespace

void bind_device(py::module_& module) {
  using Unlocked = py::call_guard<py::gil_scoped_release>;

  py::class_<Stream>(module, "Stream")
      .def(py::init([](std::uintptr_t handle, int device, int emulated_threads) {
             return Stream{handle, device, emulated_threads};
           }),
           py::arg("handle") = 0, py::arg("device") = 0, py::arg("emulated_threads") = 1);

  py::class_<DeviceKernels>(module, "DeviceKernels")
      .def(
          "require_usable",
          [](const DeviceKernels& kernels, int device) { kernels.require_usable(device); },
          py::arg("device"))
      .def(
          "shared_memory_limit",
          [](const DeviceKernels& kernels, int device) {
            return kernels.shared_memory_limit(device);
          },
          py::arg("device"))
      .def("draw_episodes", &draw_episodes, py::kw_only(), py::arg("images"), py::arg("pixel"),
           py::arg("channels"), py::arg("plane"), py::arg("factors") = 0, py::arg("shifts") = 0,
           py::arg("members"), py::arg("starts"), py::arg("counts"), py::arg("classes"),
           py::arg("ways"), py::arg("shots"), py::arg("queries"), py::arg("tasks"),
           py::arg("rotations"), py::arg("first_task"), py::arg("support_x"), py::arg("query_x"),
           py::arg("seed") = 0, py::arg("batch") = 0, py::arg("place") = 0, py::arg("stream"))
      .def("update", &update, Unlocked(), py::kw_only(), py::arg("dtype"), py::arg("theta"),
           py::arg("theta_stride"), py::arg("gradient"), py::arg("rate") = 1.0,
           py::arg("rates") = 0, py::arg("per_parameter") = false, py::arg("moved"),
           py::arg("tasks"), py::arg("size"), py::arg("stream"))
      .def("update_adjoint", &update_adjoint, Unlocked(), py::kw_only(), py::arg("dtype"),
           py::arg("cotangent"), py::arg("gradient"), py::arg("rate") = 1.0, py::arg("rates") = 0,
           py::arg("per_parameter") = false, py::arg("dgradient") = 0, py::arg("drates") = 0,
           py::arg("tasks"), py::arg("size"), py::arg("stream"));

  py::class_<Mlp>(module, "Mlp")
      .def(py::init<const DeviceKernels&, const std::string&, const std::vector<LayerTuple>&,
                    Index>(),
           py::arg("kernels"), py::arg("dtype"), py::arg("layers"), py::arg("theta_size"))
      .def("shared_bytes", &Mlp::shared_bytes, py::kw_only(), py::arg("support_examples"),
           py::arg("query_examples"))
      .def("scratch_bytes", &Mlp::scratch_bytes, py::kw_only(), py::arg("tasks"), py::arg("steps"),
           py::arg("first_order"), py::arg("rate_steps"), py::arg("gradient"),
           py::arg("rates_gradient"))
      .def("meta_step", &Mlp::meta_step, py::kw_only(), py::arg("theta"), py::arg("support_x"),
           py::arg("support_y"), py::arg("support_examples"), py::arg("support_batches") = 1,
           py::arg("query_x") = 0, py::arg("query_y") = 0, py::arg("query_examples") = 0,
           py::arg("tasks"), py::arg("steps"), py::arg("loss"), py::arg("first_order") = false,
           py::arg("rate"), py::arg("rates") = 0, py::arg("rate_steps") = 1, py::arg("losses") = 0,
           py::arg("mean_loss") = 0, py::arg("gtheta") = 0, py::arg("grates") = 0,
           py::arg("adapted") = 0, py::arg("predictions") = 0, py::arg("scratch") = 0,
           py::arg("arrived") = 0, py::arg("stream"));

  constexpr auto kStatic = py::return_value_policy::reference;
  module.attr("cuda") = py::cast(cuda_kernels(), kStatic);
  module.attr("emulated") = py::cast(emulated_kernels(), kStatic);
}

}  // namespace fastmaml
