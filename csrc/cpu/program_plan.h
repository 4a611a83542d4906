// From a spec to a plan: layouts, rearrangements, and who may write in whose memory.
#pragma once

#include "cpu/program_op.h"
#include "fastmaml/core.h"

namespace fastmaml {

template <typename T>
Plan<T> make_plan(const ProgramSpec& spec, const Kernels<T>& kernels);

}  // namespace fastmaml
