// exp and its relatives, erfcx, sine and logarithm on vectors, accurate to a few units in the last
// place; the C library, lane by lane, where an argument is out of their range.
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
template <typename T>
FASTMAML_INLINE bool all_lanes(MaskVec<T> mask) {
  std::uint64_t words[sizeof mask / 8], all = ~std::uint64_t{0};
  __builtin_memcpy(words, &mask, sizeof mask);
  for (const std::uint64_t word : words) all &= word;
  return all == ~std::uint64_t{0};
}

FASTMAML_INLINE float scalar_log1p(float x) { return ::log1pf(x); }
FASTMAML_INLINE double scalar_log1p(double x) { return ::log1p(x); }
FASTMAML_INLINE float scalar_sin(float x) { return ::sinf(x); }
FASTMAML_INLINE double scalar_sin(double x) { return ::sin(x); }
FASTMAML_INLINE float scalar_cos(float x) { return ::cosf(x); }
FASTMAML_INLINE double scalar_cos(double x) { return ::cos(x); }
FASTMAML_INLINE float scalar_log(float x) { return ::logf(x); }
FASTMAML_INLINE double scalar_log(double x) { return ::log(x); }
FASTMAML_INLINE float scalar_exp(float x) { return ::expf(x); }
FASTMAML_INLINE double scalar_exp(double x) { return ::exp(x); }

// sum of coefficients[i] x^i
template <typename T, int N>
FASTMAML_INLINE Vec<T> polynomial(const T (&coefficients)[N], Vec<T> x) {
  Vec<T> sum = broadcast(coefficients[N - 1]);
  for (int i = N - 2; i >= 0; --i) sum = fma(sum, x, broadcast(coefficients[i]));
  return sum;
}

// (1 + 2 x) exp(x^2) erfc(x) for x >= 0 as a polynomial in (x - k) / (x + k), as Shepherd and
// Laframboise have it ("Chebyshev approximation of (1 + 2x) exp(x^2) erfc x in 0 <= x < inf",
// 1981).
template <typename T>
struct ErfcConstants;
template <>
struct ErfcConstants<float> {
  static constexpr float kCentre = 2, kFlat = 15;  // where nothing is left of erfc itself
  static constexpr float kTerms[] = {1.276978391f,      -0.09276381574f,  -0.1660310904f,
                                     0.1640504971f,     -0.05421199524f,  -0.008024739103f,
                                     0.008689252695f,   0.001230503217f,  -0.001395805088f,
                                     -0.0003709284114f, 0.0001608403463f, 6.807514759e-5f};
};
template <>
struct ErfcConstants<double> {
  static constexpr double kCentre = 4, kFlat = 30;
  static constexpr double kTerms[] = {
      1.23299511862555251,     -0.139621116840562284,     0.0153796521026199743,
      0.0680970542546683824,   -0.101039066036318116,     0.0937328349991126394,
      -0.0663303658118605826,  0.0371675155263380049,     -0.0161977340629347693,
      0.00503197006910224605,  -0.000757773243594267380,  -0.000199257152472606970,
      0.000150621426086564348, -0.0000243977311431547042, -0.0000112211356660975787,
      5.70657829949185279e-6,  2.91734255982506067e-7,    -8.21064793640927734e-7,
      7.77194320990597437e-8,  1.06318176179173444e-7,    -2.07258022467135171e-8,
      -1.23387315097152211e-8, 3.23239723838201002e-9,    9.29762546530450859e-10,
      -2.76412003174114122e-10};
};

// exp(x^2) erfc(x) for x >= 0; from kFlat on as there.
template <typename T>
FASTMAML_INLINE Vec<T> vector_erfcx(Vec<T> x) {
  using C = ErfcConstants<T>;
  const Vec<T> centre = broadcast(C::kCentre), flat = broadcast(C::kFlat);
  const Vec<T> a = select<T>(x > flat, flat, x);
  return polynomial(C::kTerms, (a - centre) / (a + centre)) /
         fma(broadcast(T(2)), a, broadcast(T(1)));
}

// exp(-x^2 / 2), with what is lost by rounding the square.
template <typename T>
FASTMAML_INLINE Vec<T> vector_gaussian(Vec<T> x) {
  const Vec<T> minus_half = broadcast(T(-0.5)), square = x * x;
  const Vec<T> lost = select<T>(square > broadcast(T(1e4)), Vec<T>{}, fma(x, x, -square));
  return vector_exp<T>(minus_half * square) * fma(minus_half, lost, broadcast(T(1)));
}

// Multiples of pi / 2, in parts whose products with them are exact, and Taylor coefficients behind
// the first.
template <typename T>
struct AngleConstants;
template <>
struct AngleConstants<float> {
  static constexpr float kParts[] = {1.5703125f, 4.837512969970703125e-4f, 7.54978995489188e-8f};
  static constexpr float kFarthest = 8192;
  static constexpr float kSine[] = {-1 / 6.f, 1 / 120.f, -1 / 5040.f, 1 / 362880.f};
  static constexpr float kCosine[] = {-1 / 2.f, 1 / 24.f, -1 / 720.f, 1 / 40320.f, -1 / 3628800.f};
};
template <>
struct AngleConstants<double> {
  static constexpr double kParts[] = {1.57079632673412561417, 6.07710050630396597660e-11,
                                      2.02226624879595063154e-21};
  static constexpr double kFarthest = 1e5;
  static constexpr double kSine[] = {
      -1 / 6.,        1 / 120.,        -1 / 5040.,         1 / 362880.,
      -1 / 39916800., 1 / 6227020800., -1 / 1307674368000.};
  static constexpr double kCosine[] = {
      -1 / 2.,       1 / 24.,        -1 / 720.,         1 / 40320.,
      -1 / 3628800., 1 / 479001600., -1 / 87178291200., 1 / 20922789888000.};
};

// sin(x + quarters pi / 2)
template <typename T>
FASTMAML_INLINE Vec<T> shifted_sin(Vec<T> x, int quarters) {
  using C = AngleConstants<T>;
  const Vec<T> round = broadcast(ExpConstants<T>::kRound);
  const Vec<T> rounded = fma(x, broadcast(T(0.63661977236758134308)), round), n = rounded - round;
  Vec<T> r = x;
  for (const T part : C::kParts) r = fma(n, broadcast(-part), r);
  const Vec<T> square = r * r;
  const Vec<T> sine = fma(r * square, polynomial(C::kSine, square), r);
  const Vec<T> cosine = fma(square, polynomial(C::kCosine, square), broadcast(T(1)));
  const MaskVec<T> quarter = (MaskVec<T>)rounded + typename VectorTypes<T>::Bits(quarters);
  const Vec<T> value = select<T>((quarter & 1) != 0, cosine, sine);
  return select<T>((quarter & 2) != 0, -value, value);
}
template <typename T>
FASTMAML_INLINE bool near_zero(Vec<T> x) {
  return all_lanes<T>(absolute<T>(x) <= broadcast(AngleConstants<T>::kFarthest));
}
template <typename T>
FASTMAML_INLINE Vec<T> vector_sin(Vec<T> x) {
  if (near_zero<T>(x)) return shifted_sin<T>(x, 0);
  return each_lane<T>(x, [](T v) { return scalar_sin(v); });
}
template <typename T>
FASTMAML_INLINE Vec<T> vector_cos(Vec<T> x) {
  if (near_zero<T>(x)) return shifted_sin<T>(x, 1);
  return each_lane<T>(x, [](T v) { return scalar_cos(v); });
}

// log(m) = 2 (s + s^3 / 3 + ...), s = (m - 1) / (m + 1), for m from sqrt(1/2) to sqrt(2).
template <typename T>
struct LogConstants;
template <>
struct LogConstants<float> {
  static constexpr float kLowest = 1.17549435e-38f, kHighest = 3.40282347e38f;
  static constexpr float kRootHalf = 0.70710678f;
  static constexpr float kTerms[] = {2 / 3.f, 2 / 5.f, 2 / 7.f, 2 / 9.f};
};
template <>
struct LogConstants<double> {
  static constexpr double kLowest = 2.2250738585072014e-308, kHighest = 1.7976931348623157e308;
  static constexpr double kRootHalf = 0.70710678118654752440;
  static constexpr double kTerms[] = {2 / 3.,  2 / 5.,  2 / 7.,  2 / 9.,  2 / 11.,
                                      2 / 13., 2 / 15., 2 / 17., 2 / 19., 2 / 21.};
};

template <typename T>
FASTMAML_INLINE bool is_normal(Vec<T> x) {
  using C = LogConstants<T>;
  return all_lanes<T>((x >= broadcast(C::kLowest)) & (x <= broadcast(C::kHighest)));
}
template <typename T>
FASTMAML_INLINE Vec<T> log_of_normal(Vec<T> x) {
  using C = LogConstants<T>;
  using E = ExpConstants<T>;
  const Vec<T> one = broadcast(T(1)), round = broadcast(E::kRound);
  const MaskVec<T> bits = (MaskVec<T>)x;
  const MaskVec<T> exponent = (bits - (MaskVec<T>)broadcast(C::kRootHalf)) >> E::kMantissaBits;
  const Vec<T> n = (Vec<T>)((MaskVec<T>)round + exponent) - round;
  const Vec<T> m = (Vec<T>)(bits - (exponent << E::kMantissaBits));
  const Vec<T> s = (m - one) / (m + one), square = s * s;
  const Vec<T> low = fma(s * square, polynomial(C::kTerms, square), n * broadcast(E::kLn2Low));
  return fma(n, broadcast(E::kLn2High), fma(broadcast(T(2)), s, low));
}
template <typename T>
FASTMAML_INLINE Vec<T> vector_log(Vec<T> x) {
  if (is_normal<T>(x)) return log_of_normal<T>(x);
  return each_lane<T>(x, [](T v) { return scalar_log(v); });
}
template <typename T>
FASTMAML_INLINE Vec<T> vector_log1p(Vec<T> x) {
  const Vec<T> one = broadcast(T(1)), sum = one + x;
  // What the sum has rounded off is no more than a few of its last places.
  if (is_normal<T>(sum)) return log_of_normal<T>(sum) + (x - (sum - one)) / sum;
  return each_lane<T>(x, [](T v) { return scalar_log1p(v); });
}

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
