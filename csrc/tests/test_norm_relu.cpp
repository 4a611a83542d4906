// Batch norm, ReLU and max-pool as one kernel, against the norm's own kernels and plain loops for
// the rest.
#include "check.h"

namespace {

using namespace fastmaml_test;
using fastmaml::NormReluShape;
using fastmaml::NormReluState;
using fastmaml::NormReluTangent;
using fastmaml::padded;

constexpr double kEps = 1e-3;

template <typename T>
using Values = std::vector<T>;

template <typename T>
struct Case {
  const Kernels<T>& kernels;
  NormReluShape shape;
  bool affine, with_tangents, accumulate;
  Index ld, rows, outputs;
  Values<T> x, dx, gy, dgy, gamma, beta, dgamma, dbeta, start;

  Case(const Kernels<T>& k, const NormReluShape& s, bool affine, bool with_tangents)
      : kernels(k),
        shape(s),
        affine(affine),
        with_tangents(with_tangents),
        accumulate(affine),
        ld(padded(s.channels, k.lanes)),
        rows(s.images * s.height * s.width),
        outputs(s.images * (s.height / s.window) * (s.width / s.window)) {
    for (auto* v : {&x, &dx}) *v = random_rows<T>(rows, s.channels, ld);
    for (auto* v : {&gy, &dgy}) *v = random_rows<T>(outputs, s.channels, ld);
    for (auto* v : {&gamma, &beta, &dgamma, &dbeta}) *v = random_rows<T>(1, s.channels, ld);
    start = accumulate ? random_rows<T>(rows, s.channels, ld) : poisoned<T>(rows * ld);
  }

  const T* parameter(const Values<T>& v) const { return affine ? v.data() : nullptr; }
  const T* moving(const Values<T>& v) const { return with_tangents ? v.data() : nullptr; }
};

template <typename T>
struct Results {
  Values<T> y, mean, variance, inv_std, gx, ggamma, gbeta, dy, dgx, dggamma, dgbeta;

  explicit Results(const Case<T>& c) : gx(c.start), dgx(c.start) {
    for (auto* v : {&y, &dy}) *v = poisoned<T>(c.outputs * c.ld);
    for (auto* v : {&mean, &variance, &inv_std, &ggamma, &gbeta, &dggamma, &dgbeta}) {
      *v = poisoned<T>(c.ld);
    }
  }
};

template <typename T>
Results<T> fused(const Case<T>& c, int parts) {
  Results<T> r(c);
  Values<T> origin = poisoned<T>(c.outputs * c.ld), mean_dx = poisoned<T>(c.ld), m = mean_dx;
  const NormReluState<T> state = {
      c.x.data(),          c.parameter(c.gamma),
      c.parameter(c.beta), r.mean.data(),
      r.variance.data(),   r.inv_std.data(),
      r.y.data(),          c.shape.window == 1 ? nullptr : origin.data()};
  const NormReluTangent<T> tangent = {c.moving(c.dx), c.parameter(c.dgamma), mean_dx.data(),
                                      m.data()};
  for (int part = 0; part < parts; ++part) {
    const Share s{part, parts};
    c.kernels.norm_relu_forward(c.shape, state, T(kEps), s);
    c.kernels.norm_relu_backward(c.shape, state, c.gy.data(), r.gx.data(), c.accumulate,
                                 r.ggamma.data(), r.gbeta.data(), s);
    c.kernels.norm_relu_tangent(c.shape, state, tangent, c.parameter(c.dbeta), r.dy.data(), s);
    c.kernels.norm_relu_backward_tangent(c.shape, state, tangent, c.gy.data(), c.moving(c.dgy),
                                         r.ggamma.data(), r.gbeta.data(), r.dgx.data(),
                                         c.accumulate, r.dggamma.data(), r.dgbeta.data(), s);
  }
  return r;
}

// For every output element the input element it comes from, or -1 where the ReLU is off.
template <typename T>
std::vector<Index> winners(const Case<T>& c, const Values<T>& normalised) {
  const NormReluShape& s = c.shape;
  std::vector<Index> from;
  for (Index out = 0; out < c.outputs; ++out) {
    const Index columns = s.width / s.window, lines = s.height / s.window;
    const Index image = out / (lines * columns), line = out / columns % lines;
    const Index row = (image * s.height + line * s.window) * s.width + out % columns * s.window;
    for (Index channel = 0; channel < c.ld; ++channel) {
      Index best = row * c.ld + channel;
      for (Index h = 0; h < s.window; ++h) {
        for (Index w = 0; w < s.window; ++w) {
          const Index at = (row + h * s.width + w) * c.ld + channel;
          if (normalised[at] > normalised[best]) best = at;
        }
      }
      from.push_back(normalised[best] > 0 ? best : -1);
    }
  }
  return from;
}

template <typename T>
Values<T> gathered(const std::vector<Index>& from, const Values<T>& values) {
  Values<T> out;
  for (Index at : from) out.push_back(at < 0 ? T(0) : values[at]);
  return out;
}
template <typename T>
Values<T> scattered(const std::vector<Index>& from, const Values<T>& values, Index size) {
  Values<T> out(size, T(0));
  for (std::size_t i = 0; i < from.size(); ++i) {
    if (from[i] >= 0) out[from[i]] += values[i];
  }
  return out;
}

template <typename T>
Results<T> one_by_one(const Case<T>& c) {
  Results<T> r(c);
  const Index size = c.rows * c.ld, channels = c.shape.channels;
  const Kernels<T>& k = c.kernels;
  Values<T> xhat(size), normalised(size), dxhat(size), moved(size), m(c.ld);
  k.norm_forward(c.rows, channels, c.x.data(), c.parameter(c.gamma), c.parameter(c.beta), T(kEps),
                 xhat.data(), normalised.data(), r.mean.data(), r.variance.data(), r.inv_std.data(),
                 {});
  const std::vector<Index> from = winners(c, normalised);
  r.y = gathered(from, normalised);
  const Values<T> g = scattered(from, c.gy, size), dg = scattered(from, c.dgy, size);
  k.norm_backward(c.rows, channels, g.data(), xhat.data(), c.parameter(c.gamma), r.inv_std.data(),
                  r.gx.data(), c.accumulate, r.ggamma.data(), r.gbeta.data(), {});
  k.norm_tangent(c.rows, channels, c.moving(c.dx), xhat.data(), c.parameter(c.gamma),
                 c.parameter(c.dgamma), c.parameter(c.dbeta), r.inv_std.data(), dxhat.data(),
                 moved.data(), m.data(), {});
  r.dy = gathered(from, moved);
  k.norm_backward_tangent(c.rows, channels, g.data(), c.moving(dg), xhat.data(), dxhat.data(),
                          c.parameter(c.gamma), c.parameter(c.dgamma), r.inv_std.data(), m.data(),
                          r.ggamma.data(), r.gbeta.data(), r.dgx.data(), c.accumulate,
                          r.dggamma.data(), r.dgbeta.data(), {});
  return r;
}

template <typename T>
void check_case(const Case<T>& c) {
  const std::string name = std::string(c.kernels.isa) + " " + scalar_name<T>() + " " +
                           std::to_string(c.shape.height) + "x" + std::to_string(c.shape.width) +
                           "x" + std::to_string(c.shape.channels) + " window " +
                           std::to_string(c.shape.window) + ": ";
  const Results<T> expected = one_by_one(c), got = fused(c, 1), parts = fused(c, 3);
  check(got.y == parts.y && got.gx == parts.gx && got.dy == parts.dy && got.dgx == parts.dgx,
        name + "in parts");
  const auto same = [&](const Values<T>& a, const Values<T>& b, const char* what) {
    check_close(a, std::vector<double>(b.begin(), b.end()), 500, name + what, 1);
  };
  same(got.y, expected.y, "y");
  same(got.mean, expected.mean, "mean");
  same(got.variance, expected.variance, "variance");
  same(got.gx, expected.gx, "gx");
  same(got.ggamma, expected.ggamma, "ggamma");
  same(got.gbeta, expected.gbeta, "gbeta");
  same(got.dy, expected.dy, "dy");
  same(got.dgx, expected.dgx, "dgx");
  same(got.dggamma, expected.dggamma, "dggamma");
  same(got.dgbeta, expected.dgbeta, "dgbeta");
}

struct TestNormRelu {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const Index channels : {1, 17, 32, 64, 100}) {
      for (const Index window : {1, 2}) {
        check_case(Case<T>(k, {3, 6, 4, window, channels}, true, true));
        check_case(Case<T>(k, {2, 7, 5, window, channels}, false, true));
        check_case(Case<T>(k, {1, 21, 14, window, channels}, true, false));
      }
    }
  }
};

}  // namespace

int main() {
  for_each_table(TestNormRelu());
  return report("norm_relu");
}
