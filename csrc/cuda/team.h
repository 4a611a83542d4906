// Block-cooperative code, written once. nvcc makes a team of the threads of a block; the host
// compiler one of as many host threads as the caller asks for (one where speed matters), so that
// the same source is tested, and searched for races, on machines without a GPU.
//
// Kernels are function objects with
//   static constexpr int kThreads;                             // of a block
//   FASTMAML_TEAM void operator()(const Team& team, unsigned char* shared) const;
// All threads of a team run it; `shared` is the block's own memory, aligned to 16 bytes.
#pragma once

#include <stdexcept>
#include <string>

#include "fastmaml/device.h"

#ifdef __CUDACC__
#include "cuda/team_cuda.h"
#else
#include "cuda/team_emulated.h"
#endif

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

// Of the arguments of the call `what`.
inline void require(bool condition, const char* what, const char* message) {
  if (!condition) throw std::invalid_argument(std::string(what) + ": " + message);
}

// a * b + c rounded twice, on any processor.
FASTMAML_TEAM inline float scale_and_shift(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}
FASTMAML_TEAM inline double scale_and_shift(double a, double b, double c) {
#ifdef __CUDA_ARCH__
  return __dadd_rn(__dmul_rn(a, b), c);
#else
  return a * b + c;
#endif
}

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
