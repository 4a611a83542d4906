// Pointwise functions and their derivatives against the C library in extended precision.
#include "check.h"

namespace {

using namespace fastmaml_test;
using fastmaml::Activation;
using Real = long double;

// Central differences of the plain formula give slope and curvature; `h` suits long double.
Real value(Activation kind, Real a, Real b, Real x) {
  switch (kind) {
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kLeakyRelu:
      return x > 0 ? x : a * x;
    case Activation::kElu:
      return x > 0 ? x : a * std::expm1(b * x);
    case Activation::kSelu:
      return 1.0507009873554804934193349852946L *
             (x > 0 ? x : 1.6732632423543772848170429916717L * std::expm1(x));
    case Activation::kGelu:
      return x * 0.5L * std::erfc(-x * std::sqrt(0.5L));
    case Activation::kGeluTanh:
      return 0.5L * x *
             (1 + std::tanh(std::sqrt(2 / std::acos(-1.0L)) * (x + 0.044715L * x * x * x)));
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-x));
    case Activation::kTanh:
      return std::tanh(x);
    case Activation::kSoftplus:
      return a * x > b ? x : std::log1p(std::exp(a * x)) / a;
    case Activation::kHardtanh:
      return std::min(std::max(x, a), b);
    case Activation::kHardsigmoid:
      return std::min(std::max(x / 6 + 0.5L, 0.0L), 1.0L);
    case Activation::kHardswish:
      return x * std::min(std::max(x / 6 + 0.5L, 0.0L), 1.0L);
    case Activation::kMish:
      return x * std::tanh(std::log1p(std::exp(x)));
    case Activation::kLogSigmoid:
      return -std::log1p(std::exp(-x));
    case Activation::kAbs:
      return std::fabs(x);
    case Activation::kSquare:
      return x * x;
    case Activation::kCube:
      return x * x * x;
    case Activation::kReciprocal:
      return 1 / x;
    case Activation::kSqrt:
    case Activation::kLength:
      return std::sqrt(x);
    case Activation::kRsqrt:
      return 1 / std::sqrt(x);
    case Activation::kLog:
      return std::log(x);
    case Activation::kClamp:
      return std::min(std::max(x, a), b);
    case Activation::kSin:
      return std::sin(x);
    case Activation::kCos:
      return std::cos(x);
    case Activation::kExp:
      return std::exp(x);
    case Activation::kIsPositive:
      return x > 0;
    case Activation::kIsZero:
      return x == 0;
  }
  return 0;
}

Real slope(Activation kind, Real a, Real b, Real x) {
  const Real h = 1e-4L;  // five points: error h^4
  const auto f = [&](Real t) { return value(kind, a, b, t); };
  return (8 * (f(x + h) - f(x - h)) - (f(x + 2 * h) - f(x - 2 * h))) / (12 * h);
}
Real curvature(Activation kind, Real a, Real b, Real x) {
  const Real h = 1e-3L;
  const auto f = [&](Real t) { return value(kind, a, b, t); };
  return (-f(x + 2 * h) + 16 * f(x + h) - 30 * f(x) + 16 * f(x - h) - f(x - 2 * h)) / (12 * h * h);
}

struct Function {
  Activation kind;
  const char* name;
  double alpha, beta;     // or kinks of a function without constants
  bool positive = false;  // where alone it is defined
};

const Function kFunctions[] = {
    {Activation::kRelu, "relu", 0, 0},
    {Activation::kLeakyRelu, "leaky_relu", 0.125, 0},
    {Activation::kElu, "elu", 1.5, 0.75},
    {Activation::kSelu, "selu", 0, 0},
    {Activation::kGelu, "gelu", 0, 0},
    {Activation::kGeluTanh, "gelu_tanh", 0, 0},
    {Activation::kSilu, "silu", 0, 0},
    {Activation::kSigmoid, "sigmoid", 0, 0},
    {Activation::kTanh, "tanh", 0, 0},
    {Activation::kSoftplus, "softplus", 2, 6},
    {Activation::kHardtanh, "hardtanh", -1.5, 2},
    {Activation::kHardsigmoid, "hardsigmoid", -3, 3},
    {Activation::kHardswish, "hardswish", -3, 3},
    {Activation::kMish, "mish", 0, 0},
    {Activation::kLogSigmoid, "log_sigmoid", 0, 0},
    {Activation::kAbs, "abs", 0, 0},
    {Activation::kSquare, "square", 0, 0},
    {Activation::kCube, "cube", 0, 0},
    {Activation::kReciprocal, "reciprocal", 0, 0, true},
    {Activation::kSqrt, "sqrt", 0, 0, true},
    {Activation::kRsqrt, "rsqrt", 0, 0, true},
    {Activation::kLength, "length", 0, 0, true},
    {Activation::kLog, "log", 0, 0, true},
    {Activation::kClamp, "clamp", -1.5, 2},
    {Activation::kSin, "sin", 0, 0},
    {Activation::kCos, "cos", 0, 0},
    {Activation::kExp, "exp", 0, 0},
    {Activation::kIsPositive, "is_positive", 0, 0},
    {Activation::kIsZero, "is_zero", 0, 0},
};

// Away from kinks, where differences would straddle them.
bool smooth(const Function& f, double x) {
  for (const double kink : {0.0, f.alpha, f.beta, f.alpha == 0 ? 0 : f.beta / f.alpha}) {
    if (std::fabs(x - kink) < 0.01) return false;
  }
  return true;
}

template <typename T>
void check_function(const Kernels<T>& k, const Function& f, Index count) {
  std::vector<T> x = random_values<T>(count, 3);
  for (T& v : x) {
    if (f.positive) v = std::fabs(v) + T(0.5);
    while (!smooth(f, v)) v += T(0.05);
  }
  const auto gy = random_values<T>(count), dx = random_values<T>(count);
  const auto dgy = random_values<T>(count), start = random_values<T>(count);
  std::vector<double> ey(count), egx(count), edy(count), edgx(count), edgx_sum(count), no_dx(count);
  for (Index i = 0; i < count; ++i) {
    const Real slope_here = slope(f.kind, f.alpha, f.beta, x[i]);
    const Real curvature_here = curvature(f.kind, f.alpha, f.beta, x[i]);
    ey[i] = static_cast<double>(value(f.kind, f.alpha, f.beta, x[i]));
    egx[i] = static_cast<double>(slope_here * gy[i]);
    edy[i] = static_cast<double>(slope_here * dx[i]);
    edgx[i] = static_cast<double>(curvature_here * dx[i] * gy[i]);
    edgx_sum[i] = edgx[i] + static_cast<double>(slope_here * dgy[i]) + start[i];
    no_dx[i] = static_cast<double>(slope_here * dgy[i]);
  }
  const T a = static_cast<T>(f.alpha), b = static_cast<T>(f.beta);
  const std::string name =
      std::string(k.isa) + " " + scalar_name<T>() + " " + f.name + " " + std::to_string(count);
  // The differences are good to about 1e-11, far above a rounding of a double.
  const double value_units = 8, slope_units = sizeof(T) == 4 ? 16 : 2e6;
  std::vector<T> out = poisoned<T>(count);
  check_shares(&out, name,
               [&](Share s) { k.act_forward(f.kind, a, b, count, x.data(), out.data(), s); });
  check_close(out, ey, value_units, name + " forward", 1);
  check_shares(&out, name, [&](Share s) {
    k.act_backward(f.kind, a, b, count, x.data(), gy.data(), out.data(), false, s);
  });
  check_close(out, egx, slope_units, name + " backward", 1);
  check_shares(&out, name, [&](Share s) {
    k.act_tangent(f.kind, a, b, count, x.data(), dx.data(), out.data(), s);
  });
  check_close(out, edy, slope_units, name + " tangent", 1);
  check_shares(&out, name, [&](Share s) {
    k.act_backward_tangent(f.kind, a, b, count, x.data(), dx.data(), gy.data(), nullptr, out.data(),
                           false, s);
  });
  check_close(out, edgx, slope_units, name + " backward tangent without dgy", 1);
  check_shares(&out, name, [&](Share s) {
    k.act_backward_tangent(f.kind, a, b, count, x.data(), nullptr, gy.data(), dgy.data(),
                           out.data(), false, s);
  });
  check_close(out, no_dx, slope_units, name + " backward tangent without dx", 1);
  out = start;
  check_shares(&out, name, [&](Share s) {
    k.act_backward_tangent(f.kind, a, b, count, x.data(), dx.data(), gy.data(), dgy.data(),
                           out.data(), true, s);
  });
  check_close(out, edgx_sum, slope_units, name + " backward tangent", 1);
}

// Relative accuracy over the whole range of the vectorised functions, and their ends.
template <typename T>
void check_range(const Kernels<T>& k, Activation kind, const char* what, double low, double high) {
  constexpr Index kCount = 4000;
  std::vector<T> x(kCount), y(kCount);
  for (Index i = 0; i < kCount; ++i) {
    x[i] = static_cast<T>(low + (high - low) * static_cast<double>(i) / kCount);
  }
  k.act_forward(kind, T(1), T(1), kCount, x.data(), y.data(), {});
  Real worst = 0;
  for (Index i = 0; i < kCount; ++i) {
    const Real expected = value(kind, 1, 1, x[i]);
    if (expected != 0) worst = std::max(worst, std::fabs((y[i] - expected) / expected));
  }
  const Real units = worst / std::numeric_limits<T>::epsilon();
  check(units < 5, std::string(k.isa) + " " + scalar_name<T>() + " " + what + " is off by " +
                       std::to_string(static_cast<double>(units)) + " roundings");
}

// Within half of what a rounding of the argument would change, however far from zero.
template <typename T>
void check_angles(const Kernels<T>& k) {
  constexpr Index kCount = 4000;
  std::vector<T> x(kCount), y(kCount);
  for (const double farthest : {10.0, 8000.0, 1e6}) {
    for (Index i = 0; i < kCount; ++i) {
      x[i] = static_cast<T>(farthest * (2 * static_cast<double>(i) / kCount - 1));
    }
    for (const Activation kind : {Activation::kSin, Activation::kCos}) {
      k.act_forward(kind, T(0), T(0), kCount, x.data(), y.data(), {});
      Real worst = 0;
      for (Index i = 0; i < kCount; ++i) {
        worst = std::max(worst, std::fabs(y[i] - value(kind, 0, 0, x[i])));
      }
      check(
          worst < 2 * std::numeric_limits<T>::epsilon(),
          std::string(k.isa) + " " + scalar_name<T>() + " sines up to " + std::to_string(farthest));
    }
  }
}

template <typename T>
void check_special_values(const Kernels<T>& k) {
  const T inf = std::numeric_limits<T>::infinity(), nan = std::numeric_limits<T>::quiet_NaN();
  const std::vector<T> x = {inf, -inf, nan, T(1e4), T(-1e4)};
  std::vector<T> y(x.size());
  const auto run = [&](Activation kind) {
    k.act_forward(kind, T(1), T(20), static_cast<Index>(x.size()), x.data(), y.data(), {});
  };
  run(Activation::kExp);
  check(y[0] == inf && y[1] == 0 && std::isnan(y[2]) && y[3] == inf && y[4] == 0,
        "exp at the ends");
  run(Activation::kTanh);
  check(y[0] == 1 && y[1] == -1 && std::isnan(y[2]) && y[3] == 1 && y[4] == -1, "tanh at the ends");
  run(Activation::kSigmoid);
  check(y[0] == 1 && y[1] == 0 && std::isnan(y[2]) && y[3] == 1 && y[4] == 0,
        "sigmoid at the ends");
  run(Activation::kRelu);
  check(y[0] == inf && std::isnan(y[2]) && y[4] == 0, "relu at the ends");
  run(Activation::kMish);
  check(y[0] == inf && std::isnan(y[2]) && y[3] == T(1e4) && y[4] == 0, "mish at the ends");
  run(Activation::kElu);
  check(y[0] == inf && y[1] == -1 && std::isnan(y[2]), "elu at the ends");
  run(Activation::kGelu);
  check(y[0] == inf && std::isnan(y[2]) && y[3] == T(1e4) && y[4] == 0, "gelu at the ends");
  run(Activation::kSin);
  check(std::isnan(y[0]) && std::isnan(y[1]) && std::isnan(y[2]) && std::fabs(y[3]) <= 1,
        "sin at the ends");
  run(Activation::kLog);
  check(y[0] == inf && std::isnan(y[1]) && std::isnan(y[2]) && std::isnan(y[4]), "log at the ends");
  run(Activation::kClamp);
  check(y[0] == 20 && y[1] == 1 && std::isnan(y[2]), "clamp at the ends");
}

// Where a norm has no slope, PyTorch's is zero.
template <typename T>
void check_length_of_nothing(const Kernels<T>& k) {
  const T x = 0, gy = 3, dx = 2;
  T y = 1, gx = 1, dgx = 1;
  k.act_forward(Activation::kLength, T(0), T(0), 1, &x, &y, {});
  k.act_backward(Activation::kLength, T(0), T(0), 1, &x, &gy, &gx, false, {});
  k.act_backward_tangent(Activation::kLength, T(0), T(0), 1, &x, &dx, &gy, &gy, &dgx, false, {});
  check(y == 0 && gx == 0 && dgx == 0, std::string(k.isa) + " the length of nothing");
}

struct TestActivation {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const Function& f : kFunctions) {
      for (const Index count : {1, 7, 64, 333}) check_function(k, f, count);
    }
    const double highest = sizeof(T) == 4 ? 88.7 : 709.7, lowest = sizeof(T) == 4 ? -87 : -708;
    check_range(k, Activation::kExp, "exp", lowest, highest);
    check_range(k, Activation::kExp, "exp near zero", -1e-2, 1e-2);
    check_range(k, Activation::kTanh, "tanh", -12, 12);
    check_range(k, Activation::kTanh, "tanh near zero", -1e-3, 1e-3);
    check_range(k, Activation::kSigmoid, "sigmoid", -80, 80);
    check_range(k, Activation::kElu, "elu", -20, 0);
    check_range(k, Activation::kMish, "mish", -80, 80);
    check_range(k, Activation::kGelu, "gelu", -4, 8);
    check_range(k, Activation::kSin, "sin near zero", -3, 3);
    check_range(k, Activation::kLog, "log", 1e-30, 10);
    check_range(k, Activation::kLog, "log near one", 0.9, 1.1);
    check_range(k, Activation::kLog, "log of large numbers", 1, 1e30);
    check_range(k, Activation::kSoftplus, "softplus", -80, 20);
    check_range(k, Activation::kLogSigmoid, "log sigmoid", -80, 80);
    check_angles(k);
    check_special_values(k);
    check_length_of_nothing(k);
  }
};

}  // namespace

int main() {
  for_each_table(TestActivation());
  return report("activation");
}
