// Losses averaged over a task; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {

// Lives outside the per-instruction-set objects, which may not instantiate std::string's code.
[[noreturn]] void throw_label_out_of_range(Index row, std::int64_t label, Index columns);

namespace FASTMAML_ISA {

template <typename T>
T loss_gradient(Loss kind, Index rows, Index columns, const T* y, const std::int64_t* labels,
                const T* values, T* gy);
template <typename T>
void loss_tangent(Loss kind, Index rows, Index columns, const T* y, const T* dy, T* dgy);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
