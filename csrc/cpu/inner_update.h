// The inner update rule, element by element.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void inner_update(Index count, const InnerStep<T>& step, T* theta, T* m, T* v, Share share);
template <typename T>
void inner_adjoint(Index count, const InnerStep<T>& step, const InnerAdjoint<T>& adjoint,
                   Share share);
template <typename T>
void block_products(Index count, const T* a, const T* b, T* sums, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
