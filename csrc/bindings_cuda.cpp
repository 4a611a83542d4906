// fastmaml._core.DeviceKernels: the kernels of the GPU, and the same ones on the host.
#include <pybind11/pybind11.h>

#include <string>

#include "bindings.h"
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

}  // namespace

void bind_device(py::module_& module) {
  py::class_<Stream>(module, "Stream")
      .def(py::init([](std::uintptr_t handle, int device, int emulated_threads) {
             return Stream{handle, device, emulated_threads};
           }),
           py::arg("handle") = 0, py::arg("device") = 0, py::arg("emulated_threads") = 1);

  py::class_<DeviceKernels>(module, "DeviceKernels")
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
           py::arg("seed") = 0, py::arg("batch") = 0, py::arg("place") = 0, py::arg("stream"));

  constexpr auto kStatic = py::return_value_policy::reference;
  module.attr("cuda") = py::cast(cuda_kernels(), kStatic);
  module.attr("emulated") = py::cast(emulated_kernels(), kStatic);
}

}  // namespace fastmaml
