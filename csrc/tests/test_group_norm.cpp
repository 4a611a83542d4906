// Normalisation of each example by itself: values against plain loops in double precision, tangents
// against the same loops differentiated by hand.
#include "check.h"

namespace {

using namespace fastmaml_test;
using fastmaml::GroupNormShape;
using fastmaml::padded;

using Values = std::vector<double>;

template <typename T>
Values widened(const std::vector<T>& v) {
  return Values(v.begin(), v.end());
}

template <typename T>
struct Inputs {
  std::vector<T> x, dx, gy, dgy, gamma, beta, dgamma, dbeta, start;
};

template <typename V>
struct Outputs {
  V xhat, y, inv_std, gx, ggamma, gbeta, dxhat, dy, m, dgx, dggamma, dgbeta;
};

// Everything that the kernels write, but for gx and dgx without what they are added to.
struct Reference : Outputs<Values> {
  Reference(const GroupNormShape& shape, Index ld) : shape(shape), ld(ld) {
    for (Values* v : {&xhat, &y, &gx, &dxhat, &dy, &dgx}) {
      v->assign(shape.sets * shape.positions * ld, 0);
    }
    for (Values* v : {&ggamma, &gbeta, &dggamma, &dgbeta}) v->assign(shape.sets * ld, 0);
    for (Values* v : {&inv_std, &m}) v->assign(shape.sets * shape.groups, 0);
  }

  template <typename T>
  void run(const Inputs<T>& in, bool affine, double eps) {
    for (Index set = 0; set < shape.sets; ++set) {
      for (Index group = 0; group < shape.groups; ++group) run_group(in, affine, eps, set, group);
    }
  }

  template <typename Body>
  void for_elements(Index set, Index group, Body body) const {
    const Index width = shape.channels / shape.groups;
    for (Index p = 0; p < shape.positions; ++p) {
      for (Index c = group * width; c < (group + 1) * width; ++c) {
        body((set * shape.positions + p) * ld + c, set * ld + c, c);
      }
    }
  }

  template <typename T>
  void run_group(const Inputs<T>& in, bool affine, double eps, Index set, Index group) {
    const double n = static_cast<double>(shape.positions * (shape.channels / shape.groups));
    double mean = 0, dmean = 0, variance = 0, dvariance = 0;
    for_elements(set, group, [&](Index i, Index, Index) {
      mean += in.x[i] / n;
      dmean += in.dx[i] / n;
    });
    for_elements(set, group, [&](Index i, Index, Index) {
      variance += (in.x[i] - mean) * (in.x[i] - mean) / n;
      dvariance += 2 * (in.x[i] - mean) * in.dx[i] / n;
    });
    const double s = 1 / std::sqrt(variance + eps), ds = -0.5 * s * s * s * dvariance;
    double &moment = m[set * shape.groups + group], mean_u = 0, along = 0, dmean_u = 0, dalong = 0;
    inv_std[set * shape.groups + group] = s;
    const auto weights = [&](Index c) {
      return affine ? std::pair<double, double>(in.gamma[c], in.dgamma[c]) : std::pair(1.0, 0.0);
    };
    for_elements(set, group, [&](Index i, Index sum, Index c) {
      const auto [g, dg] = weights(c);
      xhat[i] = (in.x[i] - mean) * s;
      dxhat[i] = (in.dx[i] - dmean) * s + (in.x[i] - mean) * ds;
      y[i] = g * xhat[i] + (affine ? in.beta[c] : 0);
      dy[i] = g * dxhat[i] + dg * xhat[i] + (affine ? in.dbeta[c] : 0);
      moment += in.dx[i] * xhat[i] / n;
      ggamma[sum] += in.gy[i] * xhat[i];
      gbeta[sum] += in.gy[i];
      dggamma[sum] += in.dgy[i] * xhat[i] + in.gy[i] * dxhat[i];
      dgbeta[sum] += in.dgy[i];
      const double u = g * in.gy[i], du = g * in.dgy[i] + dg * in.gy[i];
      mean_u += u / n;
      along += u * xhat[i] / n;
      dmean_u += du / n;
      dalong += (du * xhat[i] + u * dxhat[i]) / n;
    });
    for_elements(set, group, [&](Index i, Index, Index c) {
      const auto [g, dg] = weights(c);
      const double q = g * in.gy[i] - mean_u - xhat[i] * along;
      const double dq =
          g * in.dgy[i] + dg * in.gy[i] - dmean_u - dxhat[i] * along - xhat[i] * dalong;
      gx[i] = s * q;
      dgx[i] = ds * q + s * dq;
    });
  }

  const GroupNormShape& shape;
  Index ld;
};

template <typename T>
Outputs<std::vector<T>> run_kernels(const Kernels<T>& k, const GroupNormShape& shape,
                                    const Inputs<T>& in, bool affine, bool moving, T eps,
                                    int parts) {
  const auto parameter = [&](const std::vector<T>& v) { return affine ? v.data() : nullptr; };
  const auto direction = [&](const std::vector<T>& v) { return moving ? v.data() : nullptr; };
  const Index ld = padded(shape.channels, k.lanes), size = shape.sets * shape.positions * ld;
  Outputs<std::vector<T>> o;
  for (auto* v : {&o.xhat, &o.y, &o.dxhat, &o.dy}) *v = poisoned<T>(size);
  for (auto* v : {&o.ggamma, &o.gbeta, &o.dggamma, &o.dgbeta}) *v = poisoned<T>(shape.sets * ld);
  for (auto* v : {&o.inv_std, &o.m}) *v = poisoned<T>(shape.sets * shape.groups);
  o.gx = o.dgx = affine ? in.start : poisoned<T>(size);
  const fastmaml::GroupNormState<T> state = {parameter(in.gamma), o.xhat.data(), o.inv_std.data()};
  const fastmaml::GroupNormTangent<T> tangent = {parameter(in.dgamma), o.dxhat.data(), o.m.data()};
  for (int part = 0; part < parts; ++part) {
    const Share s = {part, parts};
    k.group_norm_forward(shape, in.x.data(), state.gamma, parameter(in.beta), eps, o.xhat.data(),
                         o.y.data(), o.inv_std.data(), s);
    k.group_norm_backward(shape, state, in.gy.data(), o.gx.data(), affine, o.ggamma.data(),
                          o.gbeta.data(), s);
    k.group_norm_tangent(shape, state, tangent, direction(in.dx), parameter(in.dbeta), o.dy.data(),
                         s);
    k.group_norm_backward_tangent(shape, state, tangent, in.gy.data(), direction(in.dgy),
                                  o.ggamma.data(), o.gbeta.data(), o.dgx.data(), affine,
                                  o.dggamma.data(), o.dgbeta.data(), s);
  }
  return o;
}

template <typename T>
Inputs<T> random_inputs(const GroupNormShape& shape, Index ld, bool moving) {
  const Index rows = shape.sets * shape.positions;
  Inputs<T> in;
  for (auto* v : {&in.dx, &in.gy, &in.dgy, &in.start}) {
    *v = random_rows<T>(rows, shape.channels, ld);
  }
  // What pads activations may be anything. A mean far from zero: E[x^2] - E[x]^2 would lose the
  // variance.
  in.x = random_rows<T>(rows, shape.channels, ld, true);
  for (T& x : in.x) x += T(30);
  for (auto* v : {&in.gamma, &in.beta, &in.dgamma, &in.dbeta}) {
    *v = random_rows<T>(1, shape.channels, ld);
  }
  if (!moving) {
    in.dx.assign(in.dx.size(), 0);
    in.dgy.assign(in.dgy.size(), 0);
  }
  return in;
}

template <typename T>
void check_group_norm(const Kernels<T>& k, const GroupNormShape& shape, bool affine, bool moving) {
  const Index ld = padded(shape.channels, k.lanes);
  const Inputs<T> in = random_inputs<T>(shape, ld, moving);
  Reference r(shape, ld);
  r.run(in, affine, 1e-3);
  if (affine) {
    for (Values* v : {&r.gx, &r.dgx}) {
      for (std::size_t i = 0; i < v->size(); ++i) (*v)[i] += in.start[i];
    }
  }
  const auto run = [&](int parts) {
    return run_kernels<T>(k, shape, in, affine, moving, T(1e-3), parts);
  };
  const Outputs<std::vector<T>> o = run(1);
  const std::string name =
      std::string(k.isa) + " " + scalar_name<T>() + " group norm " + std::to_string(shape.sets) +
      "x" + std::to_string(shape.positions) + "x" + std::to_string(shape.channels) + " in " +
      std::to_string(shape.groups) + (affine ? " affine " : " plain ") + (moving ? "" : "still ");
  for (int parts = 2; parts <= 3; ++parts) {
    const Outputs<std::vector<T>> other = run(parts);
    check(o.y == other.y && o.gx == other.gx && o.dy == other.dy && o.dgx == other.dgx &&
              o.dggamma == other.dggamma,
          name + "in parts");
  }
  // x is 30 and its spread 1: rounding x alone costs 30 units. Few values amplify by inv_std.
  const Index values = shape.positions * (shape.channels / shape.groups);
  const double units = values > 4 ? 4000 : 400000, sum = std::sqrt(shape.positions);
  check_close(o.inv_std, r.inv_std, units, name + "inv_std");
  check_close(o.gx, r.gx, units, name + "gx");
  check_close(o.ggamma, r.ggamma, units, name + "ggamma", sum);
  check_close(o.gbeta, r.gbeta, units, name + "gbeta", sum);
  check_close(o.m, r.m, units, name + "m", 1);
  check_close(o.dgx, r.dgx, 4 * units, name + "dgx");
  check_close(o.dggamma, r.dggamma, units, name + "dggamma", sum);
  check_close(o.dgbeta, r.dgbeta, units, name + "dgbeta", sum);
  // Their padding may hold anything finite.
  const auto used = [&](auto v) {
    for (std::size_t i = 0; i < v.size(); ++i) {
      if (static_cast<Index>(i) % ld >= shape.channels) v[i] = std::isfinite(v[i]) ? 0 : NAN;
    }
    return v;
  };
  check_close(used(o.xhat), r.xhat, units, name + "xhat");
  check_close(used(o.y), r.y, units, name + "y");
  check_close(used(o.dxhat), r.dxhat, units, name + "dxhat", 1);
  check_close(used(o.dy), r.dy, units, name + "dy", 1);
}

struct TestGroupNorm {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    const std::vector<std::pair<Index, Index>> groupings = {
        {1, 3}, {1, 16}, {1, 40}, {1, 100}, {2, 34}, {3, 12}, {8, 32}, {17, 17}, {25, 100}};
    for (const Index sets : {1, 5}) {
      for (const Index positions : {1, 2, 9, 300}) {
        for (const auto& [groups, channels] : groupings) {
          if (positions * (channels / groups) < 3) continue;  // no spread
          const GroupNormShape shape = {sets, positions, channels, groups};
          check_group_norm(k, shape, true, true);
          check_group_norm(k, shape, false, true);
          check_group_norm(k, shape, true, false);
        }
      }
    }
  }
};

}  // namespace

int main() {
  for_each_table(TestGroupNorm());
  return report("group_norm");
}
