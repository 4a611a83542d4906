// fastmaml._core.draw_episodes, and the memory of its batches.
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "cpu/program_memory.h"
#include "fastmaml/core.h"

namespace py = pybind11;

namespace fastmaml {

namespace {

Rotations rotations_named(const std::string& name) {
  if (name == "none") return Rotations::kNone;
  if (name == "per_class") return Rotations::kPerClass;
  if (name == "as_classes") return Rotations::kAsClasses;
  throw py::value_error("rotations must be 'none', 'per_class' or 'as_classes', got '" + name +
                        "'");
}

template <typename T>
const T* array(std::uintptr_t address) {
  return reinterpret_cast<const T*>(address);
}

// Bytes for a batch. They come from the batches that nobody holds any more: fresh memory of that
// size would cost more page faults than the drawing.
class BatchMemory {
 public:
  explicit BatchMemory(Index bytes) : bytes_(bytes), memory_(pool().take<char>(bytes)) {}

  py::buffer_info info() const {
    return py::buffer_info(memory_.get(), sizeof(char), py::format_descriptor<char>::format(), 1,
                           {bytes_}, {Index{1}});
  }

 private:
  static ArenaPool& pool() {
    static const auto pool = std::make_shared<ArenaPool>();
    return *pool;
  }

  Index bytes_;
  std::shared_ptr<char> memory_;
};

void draw(std::uintptr_t images, Index element_bytes, std::uintptr_t values,
          bool values_per_channel, Index channels, Index plane, std::uintptr_t turned,
          std::uintptr_t members, std::uintptr_t starts, std::uintptr_t counts, Index classes,
          Index ways, Index shots, Index queries, Index tasks, const std::string& rotations,
          std::uint64_t seed, std::uint64_t batch, Index first_task, std::uintptr_t support_x,
          std::uintptr_t query_x, int threads) {
  EpisodeArgs args;
  args.store = {array<void>(images),
                array<float>(values),
                values_per_channel,
                element_bytes,
                channels,
                plane,
                array<std::int32_t>(turned)};
  args.members = array<Index>(members);
  args.starts = array<Index>(starts);
  args.counts = array<Index>(counts);
  args.classes = classes;
  args.ways = ways;
  args.shots = shots;
  args.queries = queries;
  args.tasks = tasks;
  args.rotations = rotations_named(rotations);
  args.seed = seed;
  args.batch = batch;
  args.first_task = first_task;
  args.support_x = reinterpret_cast<void*>(support_x);
  args.query_x = reinterpret_cast<void*>(query_x);
  args.threads = threads;
  py::gil_scoped_release unlocked;
  draw_episodes(args);
}

}  // namespace

void bind_sampler(py::module_& module) {
  py::class_<BatchMemory>(module, "BatchMemory", py::buffer_protocol())
      .def(py::init<Index>(), py::arg("bytes"))
      .def_buffer(&BatchMemory::info);
  module.def("draw_episodes", &draw, py::kw_only(), py::arg("images"), py::arg("element_bytes"),
             py::arg("values") = 0, py::arg("values_per_channel") = false, py::arg("channels"),
             py::arg("plane"), py::arg("turned") = 0, py::arg("members"), py::arg("starts"),
             py::arg("counts"), py::arg("classes"), py::arg("ways"), py::arg("shots"),
             py::arg("queries"), py::arg("tasks"), py::arg("rotations"), py::arg("seed"),
             py::arg("batch"), py::arg("first_task"), py::arg("support_x"), py::arg("query_x"),
             py::arg("threads") = 1);
}

}  // namespace fastmaml
