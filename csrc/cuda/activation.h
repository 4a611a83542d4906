// Pointwise functions of one scalar with two derivatives, as fastmaml/rules/activation.py has them.
#pragma once

#include <cmath>

#include "cpu/kernels.h"
#include "cuda/team.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

using std::cos;
using std::erf;
using std::exp;
using std::expm1;
using std::fabs;
using std::log;
using std::log1p;
using std::sin;
using std::sqrt;
using std::tanh;

// f(x), f'(x), f''(x).
template <typename T>
struct Jet {
  T value, first, second;
};

template <typename T>
FASTMAML_TEAM Jet<T> exponential_unit(T x, T positive, T negative, T rate) {
  if (x > 0) return {positive * x, positive, 0};
  const T slope = negative * rate * exp(rate * x);
  return {negative * expm1(rate * x), slope, rate * slope};
}

template <typename T>
FASTMAML_TEAM T logistic(T x) {
  return T(1) / (T(1) + exp(-x));
}

// log(1 + exp(x)) without overflow.
template <typename T>
FASTMAML_TEAM T log1p_exp(T x) {
  return (x > 0 ? x : T(0)) + log1p(exp(-fabs(x)));
}

template <typename T>
FASTMAML_TEAM Jet<T> gelu(T x) {
  const T density = exp(T(-0.5) * x * x) * T(0.3989422804014326779);
  const T mass = T(0.5) * (1 + erf(x * T(0.7071067811865475244)));
  return {x * mass, mass + x * density, density * (2 - x * x)};
}

template <typename T>
FASTMAML_TEAM Jet<T> gelu_tanh(T x) {
  const T cubic = T(0.044715), root = T(0.7978845608028653559);
  const T t = tanh(root * (x + cubic * x * x * x));
  const T slope = root * (1 + 3 * cubic * x * x), bend = root * 6 * cubic * x;
  const T flat = 1 - t * t;
  return {T(0.5) * x * (1 + t), T(0.5) * (1 + t) + T(0.5) * x * flat * slope,
          flat * (slope + T(0.5) * x * (bend - 2 * t * slope * slope))};
}

template <typename T>
FASTMAML_TEAM Jet<T> silu(T x) {
  const T s = logistic(x), slope = s * (1 - s), curvature = slope * (1 - 2 * s);
  return {x * s, s + x * slope, 2 * slope + x * curvature};
}

template <typename T>
FASTMAML_TEAM Jet<T> softplus(T x, T beta, T threshold) {
  if (beta * x > threshold) return {x, 1, 0};
  const T s = logistic(beta * x);
  return {log1p_exp(beta * x) / beta, s, beta * s * (1 - s)};
}

template <typename T>
FASTMAML_TEAM Jet<T> hardsigmoid(T x) {
  if (x <= -3) return {0, 0, 0};
  return x >= 3 ? Jet<T>{1, 0, 0} : Jet<T>{x / 6 + T(0.5), T(1) / 6, 0};
}

template <typename T>
FASTMAML_TEAM Jet<T> mish(T x) {
  const T e = exp(x > 40 ? T(40) : x), numerator = e * (e + 2);
  const T t = numerator / (numerator + 2), s = e / (1 + e);
  const T bend = 2 / (numerator + 2) * (1 + t) * s;  // (1 - t^2) s
  return {x * t, t + x * bend, bend * (2 + x * (1 - s - 2 * t * s))};
}

template <typename T>
FASTMAML_TEAM Jet<T> square_root(T x) {
  const T root = sqrt(x);
  return {root, T(0.5) / root, T(-0.25) / (x * root)};
}

template <typename T>
FASTMAML_TEAM Jet<T> reciprocal_root(T x) {
  const T root = sqrt(x);
  return {1 / root, T(-0.5) / (x * root), T(0.75) / (x * x * root)};
}

template <typename T>
FASTMAML_TEAM Jet<T> clamp(T x, T low, T high) {
  if (x < low) return {low, 0, 0};
  return x > high ? Jet<T>{high, 0, 0} : Jet<T>{x, T(x == x), 0};
}

template <typename T>
FASTMAML_TEAM Jet<T> activation(Activation function, T x, T alpha, T beta) {
  switch (function) {
    case Activation::kRelu:
      return {x < 0 ? T(0) : x, x > 0 ? T(1) : T(0), 0};  // NaN stays NaN
    case Activation::kLeakyRelu:
      return x > 0 ? Jet<T>{x, 1, 0} : Jet<T>{alpha * x, alpha, 0};
    case Activation::kElu:
      return exponential_unit(x, T(1), alpha, beta);
    case Activation::kSelu:
      return exponential_unit(
          x, T(1.0507009873554804934193349852946),
          T(1.0507009873554804934193349852946 * 1.6732632423543772848170429916717), T(1));
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kSilu:
      return silu(x);
    case Activation::kSigmoid: {
      const T s = logistic(x), slope = s * (1 - s);
      return {s, slope, slope * (1 - 2 * s)};
    }
    case Activation::kTanh: {
      const T t = tanh(x), slope = 1 - t * t;
      return {t, slope, -2 * t * slope};
    }
    case Activation::kSoftplus:
      return softplus(x, alpha, beta);
    case Activation::kHardtanh: {
      if (x <= alpha) return {alpha, 0, 0};
      return x >= beta ? Jet<T>{beta, 0, 0} : Jet<T>{x, 1, 0};
    }
    case Activation::kHardsigmoid:
      return hardsigmoid(x);
    case Activation::kHardswish: {
      const Jet<T> gate = hardsigmoid(x);
      return {x * gate.value, gate.value + x * gate.first, 2 * gate.first};
    }
    case Activation::kMish:
      return mish(x);
    case Activation::kLogSigmoid: {
      const T s = logistic(-x);
      return {-log1p_exp(-x), s, -s * (1 - s)};
    }
    case Activation::kAbs:
      return {fabs(x), T(x > 0) - T(x < 0), 0};
    case Activation::kSquare:
      return {x * x, 2 * x, 2};
    case Activation::kCube:
      return {x * x * x, 3 * x * x, 6 * x};
    case Activation::kReciprocal:
      return {1 / x, -1 / (x * x), 2 / (x * x * x)};
    case Activation::kSqrt:
      return square_root(x);
    case Activation::kRsqrt:
      return reciprocal_root(x);
    case Activation::kLength:
      return x > 0 ? square_root(x) : Jet<T>{sqrt(x), 0, 0};
    case Activation::kLog:
      return {log(x), 1 / x, -1 / (x * x)};
    case Activation::kClamp:
      return clamp(x, alpha, beta);
    case Activation::kSin:
      return {sin(x), cos(x), -sin(x)};
    case Activation::kCos:
      return {cos(x), -sin(x), -cos(x)};
    case Activation::kExp: {
      const T e = exp(x);
      return {e, e, e};
    }
    case Activation::kIsPositive:
      return {T(x > 0), 0, 0};
    case Activation::kIsZero:
      return {T(x == 0), 0, 0};
  }
  return {x, 1, 0};
}

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
