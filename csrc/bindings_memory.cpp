// fastmaml._core.TensorMemory: what large tensors of the front end lie in.
#include <pybind11/pybind11.h>

#include <memory>

#include "bindings.h"
#include "cpu/program_memory.h"

namespace py = pybind11;

namespace fastmaml {

namespace {

// Bytes of their own, from those that nobody holds any more: fresh memory would cost page faults,
// which for tensors of a few megabytes take longer than what is done with them.
class TensorMemory {
 public:
  explicit TensorMemory(Index bytes) : bytes_(bytes), memory_(pool().take<char>(bytes)) {}

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

}  // namespace

void bind_memory(py::module_& module) {
  py::class_<TensorMemory>(module, "TensorMemory", py::buffer_protocol())
      .def(py::init<Index>(), py::arg("bytes"))
      .def_buffer(&TensorMemory::info);
}

}  // namespace fastmaml
