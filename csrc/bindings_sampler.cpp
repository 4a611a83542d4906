// fastmaml._core.EpisodeDrawer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/thread_limit.h"
#include "fastmaml/core.h"

namespace py = pybind11;

namespace fastmaml {

namespace {

const NamedValues<Rotations> kRotations = {{"none", Rotations::kNone},
                                           {"per_class", Rotations::kPerClass},
                                           {"as_classes", Rotations::kAsClasses}};
const NamedValues<Pixel> kPixels = {{"uint8", Pixel::kByte},
                                    {"float32", Pixel::kFloat},
                                    {"float64", Pixel::kDouble},
                                    {"two_bytes", Pixel::kTwoBytes}};

std::unique_ptr<EpisodeDrawer> make_drawer(std::uintptr_t images, const std::string& pixel,
                                           Index channels, Index plane,
                                           const std::vector<double>& factors,
                                           const std::vector<double>& shifts,
                                           std::uintptr_t members, const std::vector<Index>& counts,
                                           Index ways, Index shots, Index queries, Index tasks,
                                           const std::string& rotations, Index first_task) {
  if (!factors.empty() && (static_cast<Index>(factors.size()) != channels ||
                           static_cast<Index>(shifts.size()) != channels)) {
    throw py::value_error("factors and shifts must have one number for each channel");
  }
  EpisodeSpec spec;
  spec.store.images = in(images);
  spec.store.pixel = pixel_named(pixel);
  spec.store.channels = channels;
  spec.store.plane = plane;
  spec.store.factors = factors.empty() ? nullptr : factors.data();
  spec.store.shifts = factors.empty() ? nullptr : shifts.data();
  spec.members = pointer<const Index>(members);
  spec.counts = counts.data();
  spec.classes = static_cast<Index>(counts.size());
  spec.ways = ways;
  spec.shots = shots;
  spec.queries = queries;
  spec.tasks = tasks;
  spec.rotations = rotations_named(rotations);
  spec.first_task = first_task;
  return std::make_unique<EpisodeDrawer>(spec);
}

void draw(const EpisodeDrawer& drawer, std::uint64_t seed, std::uint64_t batch,
          std::uintptr_t support_x, std::uintptr_t query_x, int threads) {
  drawer.draw(seed, batch, out(support_x), out(query_x), CallThreads(threads).count());
}

}  // namespace

Pixel pixel_named(const std::string& name) { return named("pixel", name, kPixels); }
Rotations rotations_named(const std::string& name) { return named("rotations", name, kRotations); }

void bind_sampler(py::module_& module) {
  py::class_<EpisodeDrawer>(module, "EpisodeDrawer")
      .def(py::init(&make_drawer), py::kw_only(), py::arg("images"), py::arg("pixel"),
           py::arg("channels"), py::arg("plane"), py::arg("factors"), py::arg("shifts"),
           py::arg("members"), py::arg("counts"), py::arg("ways"), py::arg("shots"),
           py::arg("queries"), py::arg("tasks"), py::arg("rotations"), py::arg("first_task"))
      .def("draw", &draw, py::arg("seed"), py::arg("batch"), py::arg("support_x"),
           py::arg("query_x"), py::arg("threads") = 1, py::call_guard<py::gil_scoped_release>());
}

}  // namespace fastmaml
