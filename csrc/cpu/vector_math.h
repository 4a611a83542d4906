// exp and its relatives on vectors, accurate to a few units in the last place; the C library, lane
// by lane, for the rest.
#pragma once

#include <math.h>

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int kMantissaBits = 23, kBias = 127, kTerms = 7;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  static constexpr float kLowest = -104.0f, kHighest = 89.0f;
};
template <>
struct ExpConstants<double> {
  static constexpr int kMantissaBits = 52, kBias = 1023, kTerms = 13;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-01;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kLowest = -746.0, kHighest = 710.0;
};

template <typename T>
FASTMAML_INLINE Vec<T> select(MaskVec<T> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}
template <typename T>
FASTMAML_INLINE Vec<T> absolute(Vec<T> x) {
  return select<T>(x < Vec<T>{}, -x, x);
}

// 2^n for whole n within the exponent's range.
template <typename T>
FASTMAML_INLINE Vec<T> power_of_two(Vec<T> n) {
  using C = ExpConstants<T>;
  const MaskVec<T> bits = (MaskVec<T>)(n + broadcast(C::kRound));
  return (Vec<T>)((bits + typename VectorTypes<T>::Bits{C::kBias}) << C::kMantissaBits);
}

// x = n ln 2 + r with |r| <= ln 2 / 2; `tail` is exp(r) - 1. Not-a-number stays one.
template <typename T>
struct ReducedExp {
  Vec<T> n, tail;
};
template <typename T>
FASTMAML_INLINE ReducedExp<T> reduce_exp(Vec<T> x) {
  using C = ExpConstants<T>;
  x = select<T>(x < broadcast(C::kLowest), broadcast(C::kLowest), x);
  x = select<T>(x > broadcast(C::kHighest), broadcast(C::kHighest), x);
  const Vec<T> round = broadcast(C::kRound);
  const Vec<T> n = fma(x, broadcast(T(1.44269504088896340736)), round) - round;
  Vec<T> r = fma(n, broadcast(-C::kLn2High), x);
  r = fma(n, broadcast(-C::kLn2Low), r);
  T factorial = 1;
  for (int i = 2; i <= C::kTerms; ++i) factorial *= static_cast<T>(i);
  Vec<T> sum = broadcast(1 / factorial);
  for (int i = C::kTerms; i > 2; --i) {
    factorial /= static_cast<T>(i);
    sum = fma(sum, r, broadcast(1 / factorial));
  }
  return {n, fma(sum, r * r, r)};
}

template <typename T>
FASTMAML_INLINE Vec<T> vector_exp(Vec<T> x) {
  const ReducedExp<T> e = reduce_exp<T>(x);
  // In two factors, so that neither leaves the range where the result still fits.
  const Vec<T> round = broadcast(ExpConstants<T>::kRound);
  const Vec<T> half = fma(e.n, broadcast(T(0.5)), round) - round;
  return (e.tail + broadcast(T(1))) * power_of_two<T>(half) * power_of_two<T>(e.n - half);
}

// For x well below overflow (callers clamp).
template <typename T>
FASTMAML_INLINE Vec<T> vector_expm1(Vec<T> x) {
  const Vec<T> low = broadcast(T(-50));
  const ReducedExp<T> e = reduce_exp<T>(select<T>(x < low, low, x));
  const Vec<T> scale = power_of_two<T>(e.n);
  return fma(scale, e.tail, scale - broadcast(T(1)));
}

template <typename T>
FASTMAML_INLINE Vec<T> vector_tanh(Vec<T> x) {
  const Vec<T> limit = broadcast(T(20)), size = absolute<T>(x);
  const Vec<T> e = vector_expm1<T>(broadcast(T(2)) * select<T>(size > limit, limit, size));
  const Vec<T> t = e / (e + broadcast(T(2)));
  return select<T>(x < Vec<T>{}, -t, t);
}

// 1 - tanh(x)^2, without the cancellation.
template <typename T>
FASTMAML_INLINE Vec<T> vector_tanh_slope(Vec<T> x) {
  const Vec<T> e = vector_exp<T>(broadcast(T(-2)) * absolute<T>(x)), sum = broadcast(T(1)) + e;
  return broadcast(T(4)) * e / (sum * sum);
}

template <typename T>
FASTMAML_INLINE Vec<T> vector_sigmoid(Vec<T> x) {
  const Vec<T> one = broadcast(T(1));
  return one / (one + vector_exp<T>(-x));
}

template <typename T, typename F>
FASTMAML_INLINE Vec<T> each_lane(Vec<T> x, F f) {
  for (int i = 0; i < kLanes<T>; ++i) x[i] = f(x[i]);
  return x;
}
FASTMAML_INLINE float scalar_log1p(float x) { return ::log1pf(x); }
FASTMAML_INLINE double scalar_log1p(double x) { return ::log1p(x); }
FASTMAML_INLINE float scalar_erfc(float x) { return ::erfcf(x); }
FASTMAML_INLINE double scalar_erfc(double x) { return ::erfc(x); }
FASTMAML_INLINE float scalar_sin(float x) { return ::sinf(x); }
FASTMAML_INLINE double scalar_sin(double x) { return ::sin(x); }
FASTMAML_INLINE float scalar_cos(float x) { return ::cosf(x); }
FASTMAML_INLINE double scalar_cos(double x) { return ::cos(x); }
FASTMAML_INLINE float scalar_log(float x) { return ::logf(x); }
FASTMAML_INLINE double scalar_log(double x) { return ::log(x); }
FASTMAML_INLINE float scalar_exp(float x) { return ::expf(x); }
FASTMAML_INLINE double scalar_exp(double x) { return ::exp(x); }

template <typename T>
FASTMAML_INLINE Vec<T> vector_log1p(Vec<T> x) {
  return each_lane<T>(x, [](T v) { return scalar_log1p(v); });
}
template <typename T>
FASTMAML_INLINE Vec<T> vector_log(Vec<T> x) {
  return each_lane<T>(x, [](T v) { return scalar_log(v); });
}
template <typename T>
FASTMAML_INLINE Vec<T> vector_erfc(Vec<T> x) {
  return each_lane<T>(x, [](T v) { return scalar_erfc(v); });
}
template <typename T>
FASTMAML_INLINE Vec<T> vector_sin(Vec<T> x) {
  return each_lane<T>(x, [](T v) { return scalar_sin(v); });
}
template <typename T>
FASTMAML_INLINE Vec<T> vector_cos(Vec<T> x) {
  return each_lane<T>(x, [](T v) { return scalar_cos(v); });
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
