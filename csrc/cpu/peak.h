// What the machine can do at best; see kernels.h.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
double fma_rounds(Index rounds);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
