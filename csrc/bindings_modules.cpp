// fastmaml._core.ModuleSignatures: what programs depend on in a torch.nn.Module.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace fastmaml {

namespace {

using Fact = std::intptr_t;

constexpr Py_ssize_t kWatchedItems = 32;  // of a container; of a longer one its length alone
constexpr int kWatchedDepth = 4;
constexpr std::size_t kUsualFacts = 512, kMostFacts = 1 << 16;  // beyond, containers stay closed

// Values of attributes in the order in which they are met: numbers, strings and what containers
// hold by value, all else by its identity.
class Values {
 public:
  // What is known by its identity is put into `held` as well, where there is one.
  explicit Values(py::list* held) : held_(held) { facts_.reserve(kUsualFacts); }

  void add(PyObject* value, int depth = 0) {
    const bool inside = depth < kWatchedDepth && facts_.size() < kMostFacts;
    if (PyFloat_CheckExact(value)) {
      add_double(PyFloat_AS_DOUBLE(value));
    } else if (PyLong_CheckExact(value)) {
      add_integer(value);
    } else if (PyUnicode_CheckExact(value)) {
      add_fact(Kind::kString, hash(value));
    } else if (inside && (PyTuple_Check(value) || PyList_Check(value))) {
      add_sequence(value, depth);
    } else if (inside && PyDict_Check(value)) {
      add_dict(value, depth);
    } else {
      add_fact(Kind::kObject, reinterpret_cast<Fact>(value));
      if (held_ != nullptr) held_->append(py::handle(value));
    }
  }

  const std::vector<Fact>& facts() const { return facts_; }

 private:
  enum class Kind : Fact { kFloat, kInteger, kLongInteger, kString, kSequence, kDict, kObject };

  static Fact hash(PyObject* value) {
    const Py_hash_t found = PyObject_Hash(value);
    if (found == -1 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return found;
  }

  void add_fact(Kind kind, Fact fact) {
    facts_.push_back(static_cast<Fact>(kind));
    facts_.push_back(fact);
  }

  void add_double(double number) {
    static_assert(sizeof(Fact) == sizeof(double));
    Fact bits;
    std::memcpy(&bits, &number, sizeof(number));
    add_fact(Kind::kFloat, bits);
  }

  void add_integer(PyObject* value) {
    int overflow = 0;
    const long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (overflow == 0)
      add_fact(Kind::kInteger, static_cast<Fact>(number));
    else
      add_fact(Kind::kLongInteger, hash(value));
  }

  void add_sequence(PyObject* value, int depth) {
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(value);
    add_fact(Kind::kSequence, size);
    if (size > kWatchedItems) return;
    for (Py_ssize_t i = 0; i < size; ++i) add(PySequence_Fast_GET_ITEM(value, i), depth + 1);
  }

  void add_dict(PyObject* value, int depth) {
    const Py_ssize_t size = PyDict_Size(value);
    add_fact(Kind::kDict, size);
    if (size > kWatchedItems) return;
    PyObject *key, *item;
    for (Py_ssize_t at = 0; PyDict_Next(value, &at, &key, &item);) {
      add(key, depth + 1);
      add(item, depth + 1);
    }
  }

  std::vector<Fact> facts_;
  py::list* held_;
};

// What nn.Module itself keeps in a module's dictionary, by name.
struct Names {
  explicit Names(py::tuple of_every_module) : in_order(std::move(of_every_module)), all(in_order) {}

  // Whether the entry at `place` is one of them; they are put there first, in their order.
  bool has(PyObject* name, std::size_t place) const {
    if (place < in_order.size() && PyTuple_GET_ITEM(in_order.ptr(), place) == name) return true;
    return PySet_Contains(all.ptr(), name) == 1;
  }

  py::tuple in_order;
  py::set all;
  py::str training{"training"}, parameters{"_parameters"}, buffers{"_buffers"}, modules{"_modules"};
  py::str hooks[4] = {py::str("_forward_hooks"), py::str("_forward_pre_hooks"),
                      py::str("_backward_hooks"), py::str("_backward_pre_hooks")};
  py::str requires_grad{"requires_grad"}, dtype{"dtype"}, shape{"shape"};
};

class Signature {
 public:
  Signature(const Names& names, py::handle root, py::list* held) : names_(names), values_(held) {
    facts_.reserve(kUsualFacts);
    modules_.push_back(py::reinterpret_borrow<py::object>(root));
    for (std::size_t i = 0; i < modules_.size(); ++i) add(py::object(modules_[i]));
  }

  py::tuple bytes() const { return py::make_tuple(bytes(facts_), bytes(values_.facts())); }

 private:
  static py::bytes bytes(const std::vector<Fact>& facts) {
    return py::bytes(reinterpret_cast<const char*>(facts.data()), facts.size() * sizeof(Fact));
  }

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
    add_attributes(state);
  }

  void add_attributes(const py::dict& state) {
    PyObject *name, *value;
    Py_ssize_t at = 0;
    for (std::size_t place = 0; PyDict_Next(state.ptr(), &at, &name, &value); ++place) {
      if (names_.has(name, place)) continue;
      values_.add(name);
      values_.add(value);
    }
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
  Values values_;
};

class Signatures {
 public:
  explicit Signatures(py::tuple of_every_module) : names_(std::move(of_every_module)) {}

  py::tuple of(py::handle module) const { return Signature(names_, module, nullptr).bytes(); }

  py::list held(py::handle module) const {
    py::list objects;
    Signature(names_, module, &objects);
    return objects;
  }

 private:
  Names names_;
};

}  // namespace

void bind_modules(py::module_& module) {
  py::class_<Signatures>(module, "ModuleSignatures",
                         "What programs depend on in a module, but for the values of tensors.")
      .def(py::init<py::tuple>(), py::arg("of_every_module"),
           "``of_every_module``: the names of what nn.Module itself keeps in a module.")
      .def("of", &Signatures::of, py::arg("module"),
           "``(structure, attributes)``: the first changes with train() and eval(), "
           "requires_grad_(), dtypes, shapes, swapped parts and hooks, the second with all other "
           "attributes of the parts.")
      .def("held", &Signatures::held, py::arg("module"),
           "The objects that ``attributes`` knows by their identity.");
}

}  // namespace fastmaml
