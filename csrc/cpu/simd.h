// A few vector operations over float or double, for the one instruction set this object file is
// compiled for. The build defines FASTMAML_ISA (avx512, avx2, neon, portable: the namespace
// everything lives in, so that the linker never picks one instruction set's inline code for
// another's), FASTMAML_VECTOR_BYTES (64, 32, 16, 16) and FASTMAML_REGISTERS, how many vectors stay
// in registers (32, 16, 32, 16).
#pragma once

#include <cstdint>

#if FASTMAML_VECTOR_BYTES > 16
#include <immintrin.h>
#elif FASTMAML_REGISTERS == 32
#include <arm_neon.h>
#endif

#include "kernels.h"

#define FASTMAML_INLINE inline __attribute__((always_inline))

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  using Bits = std::int32_t;
  typedef float Vector __attribute__((vector_size(FASTMAML_VECTOR_BYTES)));
  typedef Bits Mask __attribute__((vector_size(FASTMAML_VECTOR_BYTES)));
};
template <>
struct VectorTypes<double> {
  using Bits = std::int64_t;
  typedef double Vector __attribute__((vector_size(FASTMAML_VECTOR_BYTES)));
  typedef Bits Mask __attribute__((vector_size(FASTMAML_VECTOR_BYTES)));
};

template <typename T>
using Vec = typename VectorTypes<T>::Vector;
template <typename T>
using MaskVec = typename VectorTypes<T>::Mask;
template <typename T>
constexpr int kLanes = FASTMAML_VECTOR_BYTES / static_cast<int>(sizeof(T));
constexpr bool kManyRegisters = FASTMAML_REGISTERS == 32;
constexpr bool kFused = FASTMAML_VECTOR_BYTES > 16 || kManyRegisters;  // multiply-adds

template <typename T>
FASTMAML_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <typename T>
FASTMAML_INLINE void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

#if FASTMAML_VECTOR_BYTES == 64

FASTMAML_INLINE Vec<float> broadcast(float x) { return (Vec<float>)_mm512_set1_ps(x); }
FASTMAML_INLINE Vec<double> broadcast(double x) { return (Vec<double>)_mm512_set1_pd(x); }
FASTMAML_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
FASTMAML_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
FASTMAML_INLINE Vec<float> load_first(const float* p, int count) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}
FASTMAML_INLINE Vec<double> load_first(const double* p, int count) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << count) - 1), p);
}

#elif FASTMAML_VECTOR_BYTES == 32

FASTMAML_INLINE Vec<float> broadcast(float x) { return (Vec<float>)_mm256_set1_ps(x); }
FASTMAML_INLINE Vec<double> broadcast(double x) { return (Vec<double>)_mm256_set1_pd(x); }
FASTMAML_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
FASTMAML_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
FASTMAML_INLINE Vec<float> load_first(const float* p, int count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (Vec<float>)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
}
FASTMAML_INLINE Vec<double> load_first(const double* p, int count) {
  const __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
  return (Vec<double>)_mm256_maskload_pd(p, _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), lane));
}

#else

FASTMAML_INLINE Vec<float> broadcast(float x) { return Vec<float>{x, x, x, x}; }
FASTMAML_INLINE Vec<double> broadcast(double x) { return Vec<double>{x, x}; }
#if FASTMAML_REGISTERS == 32
FASTMAML_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
FASTMAML_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
FASTMAML_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return a * b + c; }
FASTMAML_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return a * b + c; }
#endif
template <typename T>
FASTMAML_INLINE Vec<T> load_first(const T* p, int count) {
  Vec<T> v{};
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

#endif

#if FASTMAML_VECTOR_BYTES == 64
FASTMAML_INLINE void store_first(float* p, Vec<float> v, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1), (__m512)v);
}
FASTMAML_INLINE void store_first(double* p, Vec<double> v, int count) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << count) - 1), (__m512d)v);
}
#else
template <typename T>
FASTMAML_INLINE void store_first(T* p, Vec<T> v, int count) {
  for (int i = 0; i < count; ++i) p[i] = v[i];
}
#endif

// For the end of an array: a whole vector, or the `count` elements that are left.
template <typename T>
FASTMAML_INLINE Vec<T> load_up_to(const T* p, Index count) {
  return count >= kLanes<T> ? load(p) : load_first(p, static_cast<int>(count));
}
template <typename T>
FASTMAML_INLINE void store_up_to(T* p, Vec<T> v, Index count) {
  if (count >= kLanes<T>) {
    store(p, v);
  } else {
    store_first(p, v, static_cast<int>(count));
  }
}

// Lane j of the result: lane kLane[j] of a and b laid side by side.
template <typename T, int... kLane>
FASTMAML_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, kLane...);
#else
  return __builtin_shuffle(a, b, MaskVec<T>{kLane...});
#endif
}

template <typename T>
FASTMAML_INLINE Vec<T> square_root(Vec<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) {
    v[i] = sizeof(T) == 4 ? __builtin_sqrtf(static_cast<float>(v[i])) : __builtin_sqrt(v[i]);
  }
  return v;
}

template <typename T>
FASTMAML_INLINE T lane_sum(Vec<T> v) {
  T sums[kLanes<T>];
  store(sums, v);
  for (int width = kLanes<T> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  }
  return sums[0];
}

FASTMAML_INLINE Index smaller(Index a, Index b) { return a < b ? a : b; }
FASTMAML_INLINE Index larger(Index a, Index b) { return a > b ? a : b; }
FASTMAML_INLINE Index divide_up(Index a, Index b) { return (a + b - 1) / b; }

struct Range {
  Index begin, end;
};

// The part of [0, count) that a share owns; parts differ by at most one.
FASTMAML_INLINE Range split(Index count, Share share) {
  if (share.parts == 1) return {0, count};  // the common case is worth two divisions
  return {count * share.part / share.parts, count * (share.part + 1) / share.parts};
}

// [0, count) in so many parts, as even as can be: the parts one by one, at the price of a division.
class Parts {
 public:
  FASTMAML_INLINE Parts(Index count, Index parts)
      : size_(parts <= 1 ? count : count / parts), longer_(count - size_ * parts) {}
  FASTMAML_INLINE Range operator[](Index i) const {
    return {i * size_ + smaller(i, longer_), (i + 1) * size_ + smaller(i + 1, longer_)};
  }

 private:
  Index size_, longer_;
};

// Elements [begin, end) that a share owns, whole vectors but for the very last.
template <typename T>
FASTMAML_INLINE Range split_elements(Index count, Share share) {
  const Range vectors = split(divide_up(count, kLanes<T>), share);
  return {vectors.begin * kLanes<T>, smaller(vectors.end * kLanes<T>, count)};
}

template <typename T>
FASTMAML_INLINE Index padded_to_lanes(Index n) {
  return divide_up(n, kLanes<T>) * kLanes<T>;
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
