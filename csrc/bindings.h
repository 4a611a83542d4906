// What the bindings share.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

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

DType dtype_named(const std::string& name);
TaskLoss loss_named(const std::string& name);
Pixel pixel_named(const std::string& name);
Rotations rotations_named(const std::string& name);

}  // namespace fastmaml
