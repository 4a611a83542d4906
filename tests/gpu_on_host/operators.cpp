// PyTorch's operators on CUDA tensors, whose memory is the host's: what the CPU computes on it,
// once somebody waits for it. Until then its results are what lay in their memory; their shapes are
// known from a trial on copies.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "random_numbers.h"
#include "runtime.h"

namespace py = pybind11;

namespace gpu_on_host {

namespace {

using at::Tensor;
using c10::IValue;
using Stack = std::vector<IValue>;

// Without kernels of their own for CUDA tensors, they call kernels that are no operators.
const std::set<std::string> kReplacedToo = {"copy_", "zero_", "index_put_", "convolution"};
// What handles memory, not values.
const std::set<std::string> kKept = {"resize_",   "set_",      "record_stream",
                                     "is_set_to", "is_pinned", "_efficientzerotensor"};
const std::string kDropout = "native_dropout";
const std::set<std::string> kOfTwoDevices = {"copy_",      "_foreach_copy_",     "index",
                                             "index_put_", "_index_put_impl_",   "_unsafe_index",
                                             "_copy_from", "_local_scalar_dense"};
// Their results' shapes depend on values.
const std::set<std::string> kWaiting = {"nonzero",    "masked_select",      "_unique2",
                                        "unique_dim", "unique_consecutive", "bincount"};

const std::string kNamespace = "aten::";

std::string short_name(const std::string& name) { return name.substr(kNamespace.size()); }

Tensor tensor_on_host(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  void* data = tensor.numel() > 0 ? tensor.data_ptr() : nullptr;
  return at::from_blob(data, tensor.sizes(), tensor.strides(),
                       at::TensorOptions().device(at::kCPU).dtype(tensor.dtype()));
}

bool is_somebody_elses(const Tensor& tensor) { return !tensor.storage().resizable(); }

void each_tensor(const IValue& value, const std::function<void(const Tensor&)>& visit) {
  if (value.isTensor() && value.toTensor().defined()) visit(value.toTensor());
  if (!value.isList()) return;
  for (const IValue& item : value.toListRef()) each_tensor(item, visit);
}

// `value` with other tensors.
IValue mapped(const IValue& value, const std::function<Tensor(const Tensor&)>& other) {
  const auto of = [&](const Tensor& tensor) { return tensor.defined() ? other(tensor) : tensor; };
  if (value.isTensor()) return of(value.toTensor());
  if (value.isTensorList()) {
    c10::List<Tensor> tensors;
    for (const Tensor& tensor : value.toTensorVector()) tensors.push_back(of(tensor));
    return tensors;
  }
  bool holds_tensors = false;
  each_tensor(value, [&](const Tensor&) { holds_tensors = true; });
  if (!holds_tensors) return value;
  c10::List<std::optional<Tensor>> tensors;
  for (const IValue& item : value.toListRef()) {
    tensors.push_back(item.isNone() ? std::nullopt : std::optional<Tensor>(of(item.toTensor())));
  }
  return tensors;
}

// What a kernel is given: of the host's tensors their values.
IValue on_host(const IValue& value, bool written) {
  if (value.isDevice()) return c10::Device(at::kCPU);
  if (value.isGenerator()) return IValue();  // the host's own
  return mapped(value, [&](const Tensor& tensor) {
    return tensor.is_cuda() || written ? tensor_on_host(tensor) : tensor.clone();
  });
}

// Leaves the results on the stack.
void run_on_host(const c10::OperatorHandle& op, Stack& stack) {
  const at::AutoDispatchBelowAutograd below;
  const c10::impl::ExcludeDispatchKeyGuard nobody_watches(c10::DispatchKeySet(
      {c10::DispatchKey::Python, c10::DispatchKey::PythonTLSSnapshot,
       c10::DispatchKey::FuncTorchDynamicLayerFrontMode, c10::DispatchKey::FuncTorchBatched,
       c10::DispatchKey::FuncTorchDynamicLayerBackMode}));
  for (IValue& argument : stack) {  // a trial run draws from the same state
    if (argument.isGenerator()) argument = argument.toGenerator().clone();
  }
  op.callBoxed(&stack);
}

// That of the first tensor on one, or that on which one is wanted.
at::Device device_of(const Stack& arguments) {
  std::optional<at::Device> found;
  for (const IValue& argument : arguments) {
    each_tensor(argument, [&](const Tensor& tensor) {
      if (tensor.is_cuda() && !found) found = tensor.device();
    });
    if (!found && argument.isDevice() && argument.toDevice().has_index()) {
      found = argument.toDevice();
    }
  }
  return found ? *found : at::Device(at::kCUDA, c10::cuda::current_device());
}

bool is_written(const c10::Argument& argument) {
  return argument.alias_info() != nullptr && argument.alias_info()->isWrite();
}

class Call {
 public:
  Call(const c10::OperatorHandle& op, Stack arguments)
      : op_(op),
        name_(short_name(op.schema().name())),
        arguments_(std::move(arguments)),
        device_(device_of(arguments_)),
        guard_(device_),
        stream_(c10::cuda::getCurrentCUDAStream().stream()),
        captured_(is_capturing(stream_)) {}

  Stack run() {
    check_devices();
    wait_for_other_devices();
    Stack given = host_arguments();
    if (waits()) {
      wait();
      return results(computed(given), true);
    }
    Stack found;
    try {
      found = computed(trial(given));
    } catch (const c10::Error&) {  // which may be of the values, that a trial does not know
      if (captured_) throw;
      synchronize(stream_);
      return results(computed(given), true);
    }
    Stack out = results(found, false);
    enqueue(stream_, again(given));
    return out;
  }

 private:
  const std::vector<c10::Argument>& parameters() const { return op_.schema().arguments(); }

  void check_devices() const {
    if (kOfTwoDevices.count(name_)) return;
    for (const IValue& argument : arguments_) {
      each_tensor(argument, [&](const Tensor& tensor) {
        TORCH_CHECK(tensor.device() == device_ || (tensor.is_cpu() && tensor.dim() == 0), name_,
                    ": Expected all tensors to be on the same device, but found ", device_, " and ",
                    tensor.device());
      });
    }
  }

  // As copies between GPUs do, by events.
  void wait_for_other_devices() const {
    for (const IValue& argument : arguments_) {
      each_tensor(argument, [&](const Tensor& tensor) {
        if (!tensor.is_cuda() || tensor.device() == device_) return;
        synchronize(c10::cuda::getCurrentCUDAStream(tensor.device().index()).stream());
      });
    }
  }

  bool waits() const {
    if (kWaiting.count(name_)) return true;
    if (name_ == "copy_" || name_ == "_foreach_copy_") return copies_between_devices();
    if (name_ == "index" || name_ == "index_put_" || name_ == "_index_put_impl_") {
      bool found = false;
      each_tensor(arguments_[1], [&](const Tensor& index) {
        const bool mask = index.scalar_type() == at::kBool || index.scalar_type() == at::kByte;
        found = found || mask || !index.is_cuda();
      });
      return found;
    }
    for (const c10::Argument& found : op_.schema().returns()) {
      const auto kind = found.type()->kind();
      if (kind != c10::TypeKind::TensorType && kind != c10::TypeKind::ListType) return true;
    }
    return false;
  }

  bool copies_between_devices() const {
    std::set<at::DeviceType> devices;
    for (const IValue& argument : {arguments_[0], arguments_[1]}) {
      each_tensor(argument, [&](const Tensor& t) {
        if (t.numel() > 0) devices.insert(t.device().type());
      });
    }
    return devices.size() > 1 && !arguments_[2].toBool();
  }

  void wait() const {
    if (c10::cuda::warning_state().get_sync_debug_mode() != c10::cuda::SyncDebugMode::L_DISABLED) {
      c10::cuda::warn_or_error_on_sync();
    }
    if (captured_) break_off_capture(stream_);
    TORCH_CHECK(!captured_, "CUDA error: operation not permitted when stream is capturing (", name_,
                ")");
    synchronize(stream_);
  }

  static void synchronize(cudaStream_t stream) {
    TORCH_CHECK(cudaStreamSynchronize(stream) == cudaSuccess, "CUDA error: a kernel failed");
  }

  Stack computed(Stack stack) const {
    run_on_host(op_, stack);
    return stack;
  }

  Stack host_arguments() const {
    Stack host;
    for (std::size_t i = 0; i < arguments_.size(); ++i) {
      const IValue& argument = arguments_[i];
      if (parameters()[i].name() == "generator" && !captured_) {  // a replay draws others
        host.push_back(generator_of_call(device_, argument));
        continue;
      }
      const bool to_be_resized =
          is_written(parameters()[i]) && argument.isTensor() && argument.toTensor().numel() == 0;
      if (to_be_resized) {  // which memory of somebody else's cannot be
        const Tensor& out = argument.toTensor();
        host.push_back(at::empty(out.sizes(), out.options().device(at::kCPU)));
      } else {
        host.push_back(on_host(argument, is_written(parameters()[i])));
      }
    }
    return host;
  }

  // Arguments of the same shapes, that may be written to, and no indices out of bounds.
  Stack trial(const Stack& given) const {
    Stack copies;
    for (std::size_t i = 0; i < given.size(); ++i) {
      copies.push_back(mapped(given[i], [&](const Tensor& tensor) {
        const bool is_index = !tensor.is_floating_point() && is_somebody_elses(tensor);
        if (is_index) return at::zeros_like(tensor);
        return tensor.clone();  // some write to more than they say
      }));
    }
    return copies;
  }

  Stack results(const Stack& found, bool known) {
    Stack out;
    for (std::size_t i = 0; i < found.size(); ++i) out.push_back(result(i, found[i], known));
    return out;
  }

  IValue result(std::size_t i, const IValue& found, bool known) {
    if (is_written(op_.schema().returns()[i])) return written(i, found, known);
    if (found.isTensor()) return moved(i, found.toTensor(), known);
    if (!found.isTensorList()) return found;
    c10::List<Tensor> tensors;
    for (const Tensor& tensor : found.toTensorVector()) tensors.push_back(moved(i, tensor, known));
    return tensors;
  }

  IValue written(std::size_t i, const IValue& found, bool known) {
    const IValue& argument = argument_of(op_.schema().returns()[i]);
    if (found.isTensor() && found.toTensor().sizes() != argument.toTensor().sizes()) {
      argument.toTensor().resize_(found.toTensor().sizes());
      place(i, argument.toTensor(), found.toTensor(), known);
    }
    return argument;
  }

  Tensor moved(std::size_t i, const Tensor& value, bool known) {
    if (!value.defined()) return value;
    const auto options = value.options().device(device_);
    const Tensor result = at::empty_strided(value.sizes(), value.strides(), options);
    place(i, result, value, known);
    return result;
  }

  void place(std::size_t i, const Tensor& result, const Tensor& value, bool known) {
    const Tensor memory = tensor_on_host(result);
    if (known) memory.copy_(value);
    places_.emplace_back(i, memory);
  }

  const IValue& argument_of(const c10::Argument& found) const {
    for (std::size_t i = 0; i < arguments_.size(); ++i) {
      const auto* alias = parameters()[i].alias_info();
      if (alias && alias->isWrite() && alias->beforeSets() == found.alias_info()->beforeSets()) {
        return arguments_[i];
      }
    }
    TORCH_CHECK(false, name_, " returns what it was not given");
  }

  std::function<void()> again(const Stack& given) const {
    return [op = op_, given, places = places_] {
      Stack stack = given;
      run_on_host(op, stack);
      const at::AutoDispatchBelowAutograd below;
      std::size_t next = 0;
      for (std::size_t i = 0; i < stack.size(); ++i) {
        each_tensor(stack[i], [&](const Tensor& value) {
          if (next < places.size() && places[next].first == i) places[next++].second.copy_(value);
        });
      }
    };
  }

  c10::OperatorHandle op_;
  std::string name_;
  Stack arguments_;
  at::Device device_;
  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
  bool captured_;
  std::vector<std::pair<std::size_t, Tensor>> places_ = {};  // which results have, and their memory
};

void on_cuda_tensors(const c10::OperatorHandle& op, Stack* stack) {
  const std::size_t count = op.schema().arguments().size();
  Stack arguments(stack->end() - count, stack->end());
  stack->resize(stack->size() - count);
  for (IValue& result : Call(op, std::move(arguments)).run()) stack->push_back(std::move(result));
}

bool is_replaced(const c10::OperatorHandle& op) {
  const std::string name = short_name(op.schema().name());
  if (kKept.count(name) || name == kDropout || name.rfind("empty", 0) == 0 ||
      name.rfind("cudnn", 0) == 0)
    return false;
  for (const c10::Argument& found : op.schema().returns()) {
    if (found.alias_info() != nullptr && !found.alias_info()->isWrite()) return false;  // a view
  }
  return op.hasKernelForDispatchKey(c10::DispatchKey::CUDA) || kReplacedToo.count(name);
}

void install() {
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__,
                                __LINE__);
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    if (name.name.rfind(kNamespace, 0) != 0) continue;
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op || !is_replaced(*op)) continue;
    const std::string overload = name.overload_name.empty() ? "" : "." + name.overload_name;
    library.impl((short_name(name.name) + overload).c_str(),
                 torch::CppFunction::makeFromBoxedFunction<&on_cuda_tensors>());
  }
  library.impl(kDropout.c_str(), &dropout);
}

void enqueue_call(std::uintptr_t stream, py::object call) {
  const std::shared_ptr<py::object> held(new py::object(std::move(call)), [](py::object* object) {
    if (!Py_IsInitialized()) return;  // what nobody waited for, at the end of the process
    const py::gil_scoped_acquire locked;
    delete object;
  });
  const py::gil_scoped_release unlocked;
  enqueue(reinterpret_cast<cudaStream_t>(stream), [held] {
    const py::gil_scoped_acquire locked;
    try {
      (*held)();
    } catch (const py::error_already_set& error) {
      throw std::runtime_error(error.what());
    }
  });
}

}  // namespace

}  // namespace gpu_on_host

PYBIND11_MODULE(gpu_on_host_operators, module) {
  using namespace gpu_on_host;
  module.def("install", &install);
  module.def("on_host", [](const Tensor& tensor) {
    TORCH_CHECK_VALUE(tensor.is_cuda(), "kernels take CUDA tensors, got one on the CPU");
    return tensor_on_host(tensor);
  });
  module.def("enqueue", &enqueue_call);
  module.def("is_device_memory", [](std::uintptr_t pointer) {
    return is_device_memory(reinterpret_cast<const void*>(pointer));
  });
}
