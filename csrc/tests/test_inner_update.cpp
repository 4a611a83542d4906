// The inner update rule against the formula written out, its adjoint against finite differences.
#include <array>
#include <limits>

#include "check.h"
#include "differences.h"

namespace {

using namespace fastmaml_test;
using Values = std::vector<double>;
constexpr int kCount = fastmaml::kInnerCoefficients;

// Of clipping by value; gradients keep away from it, where differences would step over a bend.
constexpr double kBound = 0.6;

struct Rule {
  std::string name;
  bool momentum, nesterov, second_moment, normalise_first;
  double clip_factor, clip_value;  // 0: none
};

// What the rule reads; an array of one element is alike for all.
struct Inputs {
  Values theta, gradient, m, v;
  std::array<Values, kCount> coefficients;

  double of(int c, Index i) const {
    return coefficients[c].size() == 1 ? coefficients[c][0] : coefficients[c][i];
  }
};

struct Outputs {
  Values theta, m, v;
};

Outputs expected_update(const Rule& rule, const Inputs& in) {
  Outputs out{in.theta, in.theta, in.theta};
  for (std::size_t i = 0; i < in.theta.size(); ++i) {
    const auto c = [&](int k) { return in.of(k, static_cast<Index>(i)); };
    double g = rule.clip_factor * in.gradient[i];
    if (rule.clip_value > 0) g = std::max(-rule.clip_value, std::min(rule.clip_value, g));
    g += c(fastmaml::kInnerL2) * in.theta[i];
    double n = 1, v = 0;
    if (rule.second_moment) {
      v = c(fastmaml::kInnerKeepV) * in.v[i] + c(fastmaml::kInnerTakeV) * g * g;
      const double denominator = c(fastmaml::kInnerScale) * std::sqrt(v) + c(fastmaml::kInnerEps);
      n = denominator == 0 ? 0 : 1 / denominator;
    }
    const double x = rule.normalise_first ? n * g : g;
    const double before = rule.momentum ? in.m[i] : 0;
    const double m = c(fastmaml::kInnerKeepM) * before + c(fastmaml::kInnerTakeM) * x;
    double move = rule.nesterov ? g + c(fastmaml::kInnerKeepM) * m : m;
    if (!rule.normalise_first) move *= n;
    out.theta[i] = c(fastmaml::kInnerShrink) * in.theta[i] - c(fastmaml::kInnerStep) * move;
    out.m[i] = m;
    out.v[i] = v;
  }
  return out;
}

Inputs random_inputs(Index count, bool each) {
  Inputs in{random_values<double>(count),
            random_values<double>(count),
            random_values<double>(count),
            random_values<double>(count),
            {}};
  for (double& v : in.v) v = 0.5 + std::fabs(v);
  for (double& g : in.gradient) g *= std::fabs(g) > kBound ? 1.02 : 0.98;
  for (Values& values : in.coefficients) {
    values = random_values<double>(each ? count : 1);
    for (double& value : values) value = 0.2 + 0.5 * std::fabs(value);
  }
  return in;
}

template <typename T>
std::vector<T> as(const Values& values) {
  return std::vector<T>(values.begin(), values.end());
}

// The inputs in the kernel's type, and the step that points to them.
template <typename T>
struct Call {
  Call(const Rule& rule, const Inputs& in)
      : theta(as<T>(in.theta)), gradient(as<T>(in.gradient)), m(as<T>(in.m)), v(as<T>(in.v)) {
    step.nesterov = rule.nesterov;
    step.second_moment = rule.second_moment;
    step.normalise_first = rule.normalise_first;
    step.clip_factor = static_cast<T>(rule.clip_factor);
    step.clip_value =
        rule.clip_value == 0 ? std::numeric_limits<T>::infinity() : static_cast<T>(rule.clip_value);
    step.theta = theta.data();
    step.gradient = gradient.data();
    if (rule.momentum) step.m = m.data();
    if (rule.second_moment) step.v = v.data();
    for (int c = 0; c < kCount; ++c) {
      coefficients[c] = as<T>(in.coefficients[c]);
      step.coefficients[c] = coefficients[c].data();
      step.each[c] = coefficients[c].size() > 1;
    }
  }

  std::vector<T> theta, gradient, m, v;
  std::array<std::vector<T>, kCount> coefficients;
  fastmaml::InnerStep<T> step;
};

template <typename T>
void check_update(const Kernels<T>& k, const Rule& rule, const Inputs& in,
                  const std::string& name) {
  const Call<T> call(rule, in);
  const Index count = static_cast<Index>(in.theta.size());
  std::vector<T> out = poisoned<T>(3 * count);
  check_shares(&out, name, [&](Share share) {
    k.inner_update(count, call.step, out.data(), out.data() + count, out.data() + 2 * count, share);
  });
  const Outputs expected = expected_update(rule, in);
  Values all = expected.theta;
  all.insert(all.end(), expected.m.begin(), expected.m.end());
  all.insert(all.end(), expected.v.begin(), expected.v.end());
  check_close(out, all, 40, name);
}

// Cotangents on the outputs; those on the moments may be absent.
struct Cotangents {
  Values theta, m, v;
  bool has_moments;
};

// <cotangents, outputs>, element by element: no element depends on another.
Values weighed(const Rule& rule, const Inputs& in, const Cotangents& w) {
  const Outputs out = expected_update(rule, in);
  Values sum(out.theta.size());
  for (std::size_t i = 0; i < sum.size(); ++i) {
    sum[i] = w.theta[i] * out.theta[i];
    if (w.has_moments && rule.momentum) sum[i] += w.m[i] * out.m[i];
    if (w.has_moments && rule.second_moment) sum[i] += w.v[i] * out.v[i];
  }
  return sum;
}

// The derivative of `weighed` when all elements of one input move together.
template <typename Pick>
Values slopes(const Rule& rule, const Inputs& in, const Cotangents& w, const Pick& pick) {
  return central_difference(1e-4, [&](double step) {
    Inputs moved = in;
    for (double& value : pick(moved)) value += step;
    return weighed(rule, moved, w);
  });
}

template <typename T>
void check_adjoint(const Kernels<T>& k, const Rule& rule, const Inputs& in, bool each,
                   bool has_moments, const std::string& name) {
  const Call<T> call(rule, in);
  const Index count = static_cast<Index>(in.theta.size());
  const Index blocks = (count + fastmaml::kInnerBlock - 1) / fastmaml::kInnerBlock;
  const Cotangents w{random_values<double>(count), random_values<double>(count),
                     random_values<double>(count), has_moments};
  // theta, m, v, gradient, then each coefficient, then the sums over blocks
  std::vector<T> out(static_cast<std::size_t>((4 + kCount) * count + (kCount + 1) * blocks), T(0));
  const auto place = [&](Index row, const Values& values) {
    for (Index i = 0; i < count; ++i) out[row * count + i] = static_cast<T>(values[i]);
  };
  place(0, w.theta);
  place(1, w.m);
  place(2, w.v);
  check_shares(&out, name, [&](Share share) {
    fastmaml::InnerAdjoint<T> adjoint;
    adjoint.theta = out.data();
    if (rule.momentum) adjoint.m = out.data() + count;
    if (rule.second_moment) adjoint.v = out.data() + 2 * count;
    adjoint.has_moments = has_moments;
    adjoint.gradient = out.data() + 3 * count;
    T* sums = out.data() + (4 + kCount) * count;
    for (int c = 0; c < kCount; ++c) {
      (each ? adjoint.each : adjoint.sums)[c] =
          each ? out.data() + (4 + c) * count : sums + c * blocks;
    }
    adjoint.along = sums + kCount * blocks;
    k.inner_adjoint(count, call.step, adjoint, share);
  });
  const double units = sizeof(T) == 4 ? 200 : 1e6;
  const auto compare = [&](Index row, const Values& expected, const std::string& what) {
    const std::vector<T> got(out.begin() + row * count, out.begin() + (row + 1) * count);
    check_close(got, expected, units, name + ": " + what, 1);
  };
  compare(0, slopes(rule, in, w, [](Inputs& x) -> Values& { return x.theta; }), "theta");
  if (rule.momentum) compare(1, slopes(rule, in, w, [](Inputs& x) -> Values& { return x.m; }), "m");
  if (rule.second_moment) {
    compare(2, slopes(rule, in, w, [](Inputs& x) -> Values& { return x.v; }), "v");
  }
  const Values by_gradient = slopes(rule, in, w, [](Inputs& x) -> Values& { return x.gradient; });
  compare(3, by_gradient, "gradient");
  const auto total = [&](Index block_row) {
    T sum = 0;
    for (Index b = 0; b < blocks; ++b) sum += out[(4 + kCount) * count + block_row * blocks + b];
    return std::vector<T>{sum};
  };
  for (int c = 0; c < kCount; ++c) {
    const Values found =
        slopes(rule, in, w, [c](Inputs& x) -> Values& { return x.coefficients[c]; });
    const std::string what = "coefficient " + std::to_string(c);
    if (each) {
      compare(4 + c, found, what);
    } else {
      double sum = 0;
      for (double value : found) sum += value;
      check_close(total(c), Values{sum}, units, name + ": " + what, std::sqrt(double(count)) * 10);
    }
  }
  double along = 0;
  for (Index i = 0; i < count; ++i) along += by_gradient[i] / rule.clip_factor * in.gradient[i];
  check_close(total(kCount), Values{along}, units, name + ": along", std::sqrt(double(count)) * 10);
}

// An element that has only ever seen gradients of zero: the step's derivative is 1 / eps.
template <typename T>
void check_zero(const Kernels<T>& k, const std::string& name) {
  const Index count = 16;
  Inputs in = random_inputs(count, false);
  for (Values* values : {&in.gradient, &in.m, &in.v}) std::fill(values->begin(), values->end(), 0);
  in.coefficients[fastmaml::kInnerL2] = {0};
  in.coefficients[fastmaml::kInnerEps] = {0.5};
  const Rule rule{"zero", true, false, true, false, 1, 0};
  const Call<T> call(rule, in);
  std::vector<T> theta(count, T(1)), m(count), v(count), gradient = poisoned<T>(count);
  fastmaml::InnerAdjoint<T> adjoint;
  adjoint.theta = theta.data();
  adjoint.m = m.data();
  adjoint.v = v.data();
  adjoint.gradient = gradient.data();
  k.inner_adjoint(count, call.step, adjoint, Share{});
  const double slope = -in.of(fastmaml::kInnerStep, 0) * in.of(fastmaml::kInnerTakeM, 0) / 0.5;
  check_close(gradient, Values(count, slope), 8, name + ": derivative at zero");
  check_close(v, Values(count, 0), 0, name + ": second moment at zero");
}

template <typename T>
void check_products(const Kernels<T>& k, Index count, const std::string& name) {
  const Index blocks = (count + fastmaml::kInnerBlock - 1) / fastmaml::kInnerBlock;
  const auto a = random_values<T>(count), b = random_values<T>(count);
  Values expected(blocks);
  for (Index i = 0; i < count; ++i) {
    expected[i / fastmaml::kInnerBlock] += static_cast<double>(a[i]) * b[i];
  }
  std::vector<T> out = poisoned<T>(blocks);
  check_shares(&out, name, [&](Share share) {
    k.block_products(count, a.data(), b.data(), out.data(), share);
  });
  check_close(out, expected, 100, name + ": products", 10);
}

struct TestInnerUpdate {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    const std::vector<Rule> rules{
        {"plain", false, false, false, false, 1, 0},
        {"momentum", true, false, false, false, 1, 0},
        {"nesterov", true, true, false, false, 1, 0},
        {"adam", true, false, true, false, 1, 0},
        {"adam without momentum", false, false, true, false, 1, 0},
        {"rmsprop", false, false, true, true, 1, 0},
        {"rmsprop with momentum", true, false, true, true, 1, 0},
        {"scaled", true, false, true, false, 0.7, 0},
        {"limited", true, false, false, false, 1, kBound},
    };
    const std::string table = std::string(k.isa) + " " + scalar_name<T>() + " ";
    for (const Index count : {16, 64, 1024, 3 * 1024 + 48}) {
      for (const Rule& rule : rules) {
        for (const bool each : {false, true}) {
          const std::string name = table + rule.name + " " + std::to_string(count);
          const Inputs in = random_inputs(count, each);
          check_update(k, rule, in, name);
          check_adjoint(k, rule, in, each, true, name + " adjoint");
          check_adjoint(k, rule, in, each, false, name + " last adjoint");
        }
      }
      check_products(k, count, table);
    }
    check_zero(k, table);
  }
};

}  // namespace

int main() {
  for_each_table(TestInnerUpdate());
  return report("inner_update");
}
