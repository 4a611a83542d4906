// Rearranging and combining without arithmetic of note.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
void transpose(Index taps, Index k, Index n, const T* in, T* out, Share share);
template <typename T>
void rearrange(Index examples, const Rearrangement& arranged, const T* in, T* out, Moving how,
               Share share);
template <typename T>
void gather_sums(Index examples, Index in_size, Index out_size, const std::int32_t* starts,
                 const std::int32_t* places, const T* in, T* out, bool accumulate, Share share);
template <typename T>
void axpby(Index count, T a, const T* x, T b, const T* y, T* out, bool accumulate, Share share);
template <typename T>
void update(Index count, T a, const T* rate, const T* x, const T* g, T* out, Share share);

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
