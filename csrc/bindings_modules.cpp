// fastmaml._core.module_signature: what programs depend on in a torch.nn.Module.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace fastmaml {

namespace {

// Attributes of nn.Module, by the names it keeps them under.
struct Names {
  py::str training{"training"}, parameters{"_parameters"}, buffers{"_buffers"}, modules{"_modules"};
  py::str hooks[4] = {py::str("_forward_hooks"), py::str("_forward_pre_hooks"),
                      py::str("_backward_hooks"), py::str("_backward_pre_hooks")};
  py::str requires_grad{"requires_grad"}, dtype{"dtype"}, shape{"shape"};
};

class Signature {
 public:
  Signature(const Names& names, py::handle root) : names_(names) {
    modules_.push_back(py::reinterpret_borrow<py::object>(root));
    for (std::size_t i = 0; i < modules_.size(); ++i) add(py::object(modules_[i]));
  }

  py::bytes bytes() const {
    return py::bytes(reinterpret_cast<const char*>(facts_.data()), facts_.size() * sizeof(Fact));
  }

 private:
  using Fact = std::intptr_t;

  void add(const py::object& module) {
    const py::dict state =
        py::reinterpret_steal<py::dict>(checked(PyObject_GenericGetDict(module.ptr(), nullptr)));
    add_id(module);
    facts_.push_back(PyObject_IsTrue(module.attr(names_.training).ptr()));  // or a property
    for (const py::str& hooks : names_.hooks) {
      facts_.push_back(PyObject_Size(item(state, hooks)));
    }
    for_values(item(state, names_.parameters), [this](py::handle parameter) {
      add_id(parameter);
      if (parameter.is_none()) return;
      facts_.push_back(parameter.attr(names_.requires_grad).ptr() == Py_True);
      add_id(parameter.attr(names_.dtype));  // of each dtype there is one object
      add_shape(parameter.attr(names_.shape));
    });
    for_values(item(state, names_.buffers),
               [this](py::handle buffer) { facts_.push_back(buffer.is_none()); });
    for_values(item(state, names_.modules), [this](py::handle child) {
      if (!child.is_none()) modules_.push_back(py::reinterpret_borrow<py::object>(child));
    });
  }

  void add_id(py::handle object) { facts_.push_back(reinterpret_cast<Fact>(object.ptr())); }

  void add_shape(const py::tuple& shape) {
    facts_.push_back(static_cast<Fact>(shape.size()));
    for (py::handle size : shape) facts_.push_back(PyLong_AsSsize_t(size.ptr()));
  }

  static PyObject* checked(PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return object;
  }

  static PyObject* item(const py::dict& state, const py::str& name) {
    PyObject* found = PyDict_GetItemWithError(state.ptr(), name.ptr());
    if (found == nullptr && PyErr_Occurred() == nullptr)
      PyErr_SetObject(PyExc_KeyError, name.ptr());
    return checked(found);
  }

  template <typename Body>
  static void for_values(PyObject* mapping, const Body& body) {
    if (PyDict_CheckExact(mapping) || PyODict_Check(mapping)) {
      PyObject *key, *value;
      for (Py_ssize_t at = 0; PyDict_Next(mapping, &at, &key, &value);) body(value);
    } else {  // a dict with a mind of its own
      for (py::handle value : py::handle(mapping).attr("values")()) body(value);
    }
  }

  const Names& names_;
  std::vector<py::object> modules_;
  std::vector<Fact> facts_;
};

}  // namespace

void bind_modules(py::module_& module) {
  module.def(
      "module_signature",
      [names = Names()](py::handle root) { return Signature(names, root).bytes(); },
      py::arg("module"),
      "Changes with train() and eval(), requires_grad_(), dtypes, shapes, swapped parts and "
      "hooks.");
}

}  // namespace fastmaml
