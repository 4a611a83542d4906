// Batch normalisation: values against plain loops in double precision, tangents against the same
// loops differentiated by hand.
#include "check.h"

namespace {

using namespace fastmaml_test;
using fastmaml::padded;

using Values = std::vector<double>;

struct Reference {
  Index rows, channels, ld;
  bool training, affine;
  double eps;
  Values x, dx, gy, dgy, gamma, beta, dgamma, dbeta, mean, variance;

  Values xhat, y, inv_std, dxhat, dy, m, gx, dgx, ggamma, gbeta, dggamma, dgbeta;

  double at(const Values& v, Index i, Index c) const { return v[i * ld + c]; }

  void run() {
    const Values zeros(rows * ld, 0), channel_zeros(ld, 0);
    for (Values* v : {&xhat, &y, &dxhat, &dy, &gx, &dgx}) *v = zeros;
    for (Values* v : {&inv_std, &m, &ggamma, &gbeta, &dggamma, &dgbeta}) *v = channel_zeros;
    if (training) {
      mean = channel_zeros;
      variance = channel_zeros;
    }
    for (Index c = 0; c < ld; ++c) run_channel(c);
  }

  void run_channel(Index c) {
    const double n = static_cast<double>(rows);
    double dmean = 0, dvariance = 0;
    if (training) {
      for (Index i = 0; i < rows; ++i) mean[c] += at(x, i, c) / n;
      for (Index i = 0; i < rows; ++i) {
        variance[c] += (at(x, i, c) - mean[c]) * (at(x, i, c) - mean[c]) / n;
        dmean += at(dx, i, c) / n;
        dvariance += 2 * (at(x, i, c) - mean[c]) * at(dx, i, c) / n;
      }
    }
    const double s = 1 / std::sqrt(variance[c] + eps), ds = -0.5 * s * s * s * dvariance;
    const double g = affine ? gamma[c] : 1, dg = affine ? dgamma[c] : 0;
    inv_std[c] = s;
    for (Index i = 0; i < rows; ++i) {
      const Index j = i * ld + c;
      xhat[j] = (x[j] - mean[c]) * s;
      dxhat[j] = (dx[j] - dmean) * s + (x[j] - mean[c]) * ds;
      y[j] = g * xhat[j] + (affine ? beta[c] : 0);
      dy[j] = g * dxhat[j] + dg * xhat[j] + (affine ? dbeta[c] : 0);
      m[c] += dx[j] * xhat[j] / n;
      ggamma[c] += gy[j] * xhat[j];
      gbeta[c] += gy[j];
      dggamma[c] += dgy[j] * xhat[j] + gy[j] * dxhat[j];
      dgbeta[c] += dgy[j];
    }
    const double batch = training ? 1 : 0;
    for (Index i = 0; i < rows; ++i) {
      const Index j = i * ld + c;
      const double q = gy[j] - batch * (gbeta[c] + xhat[j] * ggamma[c]) / n;
      const double dq =
          dgy[j] - batch * (dgbeta[c] + dxhat[j] * ggamma[c] + xhat[j] * dggamma[c]) / n;
      gx[j] = g * s * q;
      dgx[j] = (dg * s + g * ds) * q + g * s * dq;
    }
  }
};

template <typename T>
Values widened(const std::vector<T>& v) {
  return Values(v.begin(), v.end());
}
Values added(Values a, const Values& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

template <typename T>
struct Inputs {
  std::vector<T> x, dx, gy, dgy, gamma, beta, dgamma, dbeta, mean, variance;
};

template <typename T>
struct Outputs {
  std::vector<T> xhat, y, mean, variance, inv_std, dxhat, dy, m, gx, dgx, ggamma, gbeta, dggamma,
      dgbeta;
};

template <typename T>
void run_kernels(const Kernels<T>& k, const Reference& r, const Inputs<T>& in, bool with_dx,
                 bool with_dgy, bool accumulate, Outputs<T>* out, Share s) {
  const T* gamma = r.affine ? in.gamma.data() : nullptr;
  const T* beta = r.affine ? in.beta.data() : nullptr;
  const T* dgamma = r.affine ? in.dgamma.data() : nullptr;
  const T* dbeta = r.affine ? in.dbeta.data() : nullptr;
  const T* dx = with_dx ? in.dx.data() : nullptr;
  const T* dgy = with_dgy ? in.dgy.data() : nullptr;
  const T eps = static_cast<T>(r.eps);
  Outputs<T>& o = *out;
  if (r.training) {
    k.norm_forward(r.rows, r.channels, in.x.data(), gamma, beta, eps, o.xhat.data(), o.y.data(),
                   o.mean.data(), o.variance.data(), o.inv_std.data(), s);
    k.norm_backward(r.rows, r.channels, in.gy.data(), o.xhat.data(), gamma, o.inv_std.data(),
                    o.gx.data(), accumulate, o.ggamma.data(), o.gbeta.data(), s);
    k.norm_tangent(r.rows, r.channels, dx, o.xhat.data(), gamma, dgamma, dbeta, o.inv_std.data(),
                   o.dxhat.data(), o.dy.data(), o.m.data(), s);
    k.norm_backward_tangent(r.rows, r.channels, in.gy.data(), dgy, o.xhat.data(), o.dxhat.data(),
                            gamma, dgamma, o.inv_std.data(), o.m.data(), o.ggamma.data(),
                            o.gbeta.data(), o.dgx.data(), accumulate, o.dggamma.data(),
                            o.dgbeta.data(), s);
    return;
  }
  k.norm_eval_forward(r.rows, r.channels, in.x.data(), in.mean.data(), in.variance.data(), eps,
                      gamma, beta, o.xhat.data(), o.y.data(), o.inv_std.data(), s);
  k.norm_eval_backward(r.rows, r.channels, in.gy.data(), o.xhat.data(), gamma, o.inv_std.data(),
                       o.gx.data(), accumulate, o.ggamma.data(), o.gbeta.data(), s);
  k.norm_eval_tangent(r.rows, r.channels, dx, o.xhat.data(), gamma, dgamma, dbeta, o.inv_std.data(),
                      o.dxhat.data(), o.dy.data(), s);
  k.norm_eval_backward_tangent(r.rows, r.channels, in.gy.data(), dgy, o.xhat.data(), o.dxhat.data(),
                               gamma, dgamma, o.inv_std.data(), o.dgx.data(), accumulate,
                               o.dggamma.data(), o.dgbeta.data(), s);
}

template <typename T>
Inputs<T> random_inputs(Index rows, Index channels, Index ld) {
  Inputs<T> in;
  for (auto* v : {&in.x, &in.dx, &in.gy, &in.dgy}) *v = random_rows<T>(rows, channels, ld);
  for (auto* v : {&in.gamma, &in.beta, &in.dgamma, &in.dbeta, &in.mean, &in.variance}) {
    *v = random_rows<T>(1, channels, ld);
  }
  for (T& v : in.variance) v = v * v + T(0.5);
  // A mean far from zero: E[x^2] - E[x]^2 would lose the variance.
  for (Index i = 0; i < rows; ++i) {
    for (Index c = 0; c < channels; ++c) in.x[i * ld + c] += T(30);
  }
  return in;
}

template <typename T>
void check_norm(const Kernels<T>& k, Index rows, Index channels, bool training, bool affine,
                bool with_tangents) {
  const Index ld = padded(channels, k.lanes);
  Inputs<T> in = random_inputs<T>(rows, channels, ld);
  if (!with_tangents) {
    in.dx.assign(in.dx.size(), 0);
    in.dgy.assign(in.dgy.size(), 0);
  }
  const bool accumulate = affine;
  Reference r{rows,
              channels,
              ld,
              training,
              affine,
              1e-3,
              widened(in.x),
              widened(in.dx),
              widened(in.gy),
              widened(in.dgy),
              widened(in.gamma),
              widened(in.beta),
              widened(in.dgamma),
              widened(in.dbeta),
              widened(in.mean),
              widened(in.variance),
              {},
              {},
              {},
              {},
              {},
              {},
              {},
              {},
              {},
              {},
              {},
              {}};
  r.run();
  const std::vector<T> start =
      accumulate ? random_rows<T>(rows, channels, ld) : poisoned<T>(rows * ld);
  Outputs<T> first;
  for (int parts = 1; parts <= 3; ++parts) {
    Outputs<T> o;
    for (auto* v : {&o.xhat, &o.y, &o.dxhat, &o.dy}) *v = poisoned<T>(rows * ld);
    for (auto* v :
         {&o.mean, &o.variance, &o.inv_std, &o.m, &o.ggamma, &o.gbeta, &o.dggamma, &o.dgbeta}) {
      *v = poisoned<T>(ld);
    }
    o.gx = o.dgx = start;
    for (int part = 0; part < parts; ++part) {
      run_kernels(k, r, in, with_tangents, with_tangents, accumulate, &o, {part, parts});
    }
    if (parts == 1) first = o;
    check(o.y == first.y && o.gx == first.gx && o.dy == first.dy && o.dgx == first.dgx &&
              o.dggamma == first.dggamma,
          std::string("norm in parts ") + k.isa);
  }
  const std::string name = std::string(k.isa) + " " + scalar_name<T>() + " norm " +
                           std::to_string(rows) + "x" + std::to_string(channels) +
                           (training ? " training " : " eval ") + (affine ? "affine " : "plain ") +
                           (with_tangents ? "tangents " : "no tangents ");
  const Values begin = accumulate ? widened(start) : Values(start.size(), 0);
  // x is 30 and its spread 1: rounding x alone costs 30 units. Few rows amplify by inv_std.
  const double units = rows > 2 ? 2000 : 100000, of_sum = std::sqrt(static_cast<double>(rows));
  if (training) {
    check_close(first.mean, r.mean, 40, name + "mean");
    check_close(first.variance, r.variance, units, name + "variance", 1);
    check_close(first.m, r.m, units, name + "m", 1);
  }
  check_close(first.inv_std, r.inv_std, units, name + "inv_std");
  check_close(first.xhat, r.xhat, units, name + "xhat");
  check_close(first.y, r.y, units, name + "y");
  check_close(first.gx, added(r.gx, begin), units, name + "gx");
  check_close(first.ggamma, r.ggamma, units, name + "ggamma", of_sum);
  check_close(first.gbeta, r.gbeta, units, name + "gbeta", of_sum);
  check_close(first.dxhat, r.dxhat, units, name + "dxhat", 1);
  check_close(first.dy, r.dy, units, name + "dy", 1);
  check_close(first.dgx, added(r.dgx, begin), 4 * units, name + "dgx");
  check_close(first.dggamma, r.dggamma, units, name + "dggamma", of_sum);
  check_close(first.dgbeta, r.dgbeta, units, name + "dgbeta", of_sum);
}

struct TestNorm {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const Index rows : {1, 2, 5, 127, 600}) {
      for (const Index channels : {1, 3, 17, 48, 64, 100}) {
        for (const bool training : {false, true}) {
          if (training && rows == 1) continue;  // no spread
          check_norm(k, rows, channels, training, true, true);
          check_norm(k, rows, channels, training, false, true);
          check_norm(k, rows, channels, training, true, false);
        }
      }
    }
  }
};

}  // namespace

int main() {
  for_each_table(TestNorm());
  return report("norm");
}
