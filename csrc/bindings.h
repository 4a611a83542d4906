// What the bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "fastmaml/core.h"

namespace fastmaml {

void bind_memory(pybind11::module_& module);
void bind_modules(pybind11::module_& module);
void bind_sampler(pybind11::module_& module);
void bind_device(pybind11::module_& module);

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline const void* in(std::uintptr_t address) { return pointer<const void>(address); }
inline void* out(std::uintptr_t address) { return pointer<void>(address); }

template <typename Value>
using NamedValues = std::vector<std::pair<const char*, Value>>;

// Throws ValueError of Python where `names` has no such name.
template <typename Value>
Value named(const char* argument, const std::string& name, const NamedValues<Value>& names) {
  std::string known;
  for (const auto& [key, value] : names) {
    if (name == key) return value;
    known += (known.empty() ? "" : ", ") + std::string(key);
  }
  throw pybind11::value_error(std::string(argument) + " must be one of " + known + ", got '" +
                              name + "'");
}

DType dtype_named(const std::string& name);
TaskLoss loss_named(const std::string& name);
Pixel pixel_named(const std::string& name);
Rotations rotations_named(const std::string& name);

}  // namespace fastmaml
