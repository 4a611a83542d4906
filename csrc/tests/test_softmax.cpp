// Softmax of rows and its logarithm, their gradients and tangents, against plain loops.
#include "check.h"

namespace {

using namespace fastmaml_test;
using fastmaml::padded;

// What the kernels compute, in doubles.
struct Expected {
  std::vector<double> y, gx, dy, dgx, dgx_added;
};

template <typename T>
struct Problem {
  bool log;
  Index rows, columns, ld;
  std::vector<T> x, dx, gy, dgy, start;

  double sum(const std::vector<T>& v, Index row) const {
    double total = 0;
    for (Index c = 0; c < columns; ++c) total += v[row * ld + c];
    return total;
  }

  Expected solve() const {
    const std::vector<double> zeros(rows * ld, 0);
    Expected e{zeros, zeros, zeros, zeros, zeros};
    for (Index row = 0; row < rows; ++row) {
      const Index at = row * ld;
      double highest = x[at], total = 0, g_mean = 0, d_mean = 0, dg_mean = 0, moved = 0;
      for (Index c = 0; c < columns; ++c) highest = std::max<double>(highest, x[at + c]);
      for (Index c = 0; c < columns; ++c) total += std::exp(x[at + c] - highest);
      const auto p = [&](Index c) { return std::exp(x[at + c] - highest) / total; };
      for (Index c = 0; c < columns; ++c) {
        g_mean += p(c) * gy[at + c];
        d_mean += p(c) * dx[at + c];
        dg_mean += p(c) * dgy[at + c];
      }
      const double g_sum = sum(gy, row), dg_sum = sum(dgy, row);
      for (Index c = 0; c < columns; ++c) {
        const double along = dx[at + c] - d_mean;
        e.y[at + c] = log ? x[at + c] - highest - std::log(total) : p(c);
        e.gx[at + c] = log ? gy[at + c] - p(c) * g_sum : p(c) * (gy[at + c] - g_mean);
        e.dy[at + c] = log ? along : p(c) * along;
        moved += p(c) * along * gy[at + c];
      }
      for (Index c = 0; c < columns; ++c) {
        const double along = p(c) * (dx[at + c] - d_mean);
        e.dgx[at + c] =
            log ? dgy[at + c] - p(c) * dg_sum - along * g_sum
                : along * (gy[at + c] - g_mean) + p(c) * (dgy[at + c] - dg_mean - moved);
        e.dgx_added[at + c] = e.dgx[at + c] + start[at + c];
      }
    }
    return e;
  }
};

template <typename T>
void check_rows(const Kernels<T>& k, bool log, Index rows, Index columns, double scale) {
  const Index ld = padded(columns, k.lanes);
  Problem<T> p{log,
               rows,
               columns,
               ld,
               random_rows<T>(rows, columns, ld, true),
               random_rows<T>(rows, columns, ld),
               random_rows<T>(rows, columns, ld),
               random_rows<T>(rows, columns, ld),
               random_rows<T>(rows, columns, ld)};
  for (T& v : p.x) v *= static_cast<T>(scale);
  const Expected e = p.solve();
  const std::string name = std::string(k.isa) + " " + scalar_name<T>() +
                           (log ? " log-softmax " : " softmax ") + std::to_string(rows) + "x" +
                           std::to_string(columns);
  const double units = 20 + 10 * scale;
  std::vector<T> y = poisoned<T>(rows * ld), dy = y, out = y;
  check_shares(&y, name, [&](Share s) {
    k.softmax_forward(log, false, rows, columns, p.x.data(), y.data(), s);
  });
  check_close(y, e.y, units, name, 1);
  check_shares(&out, name, [&](Share s) {
    k.softmax_backward(log, rows, columns, y.data(), p.gy.data(), out.data(), false, s);
  });
  check_close(out, e.gx, units, name + " backward", 1);
  check_shares(&dy, name, [&](Share s) {
    k.softmax_tangent(log, rows, columns, y.data(), p.dx.data(), dy.data(), s);
  });
  check_close(dy, e.dy, units, name + " tangent", 1);
  out = p.start;
  check_shares(&out, name, [&](Share s) {
    k.softmax_backward_tangent(log, rows, columns, y.data(), dy.data(), p.gy.data(), p.dgy.data(),
                               out.data(), true, s);
  });
  check_close(out, e.dgx_added, 2 * units, name + " backward tangent", 1);
  std::fill(p.dgy.begin(), p.dgy.end(), T(0));
  out = poisoned<T>(rows * ld);
  check_shares(&out, name, [&](Share s) {
    k.softmax_backward_tangent(log, rows, columns, y.data(), dy.data(), p.gy.data(), nullptr,
                               out.data(), false, s);
  });
  check_close(out, p.solve().dgx, 2 * units, name + " backward tangent without dgy", 1);
}

// As masks have it: no share at all, and neither NaN nor a trace in the others.
template <typename T>
void check_masked(const Kernels<T>& k) {
  const Index columns = 19, ld = padded(columns, k.lanes);
  std::vector<T> x = random_rows<T>(1, columns, ld), y = poisoned<T>(ld);
  for (Index c = 0; c < columns; c += 2) x[c] = -std::numeric_limits<T>::infinity();
  k.softmax_forward(false, false, 1, columns, x.data(), y.data(), {});
  double total = 0;
  for (Index c = 0; c < columns; ++c) {
    total += y[c];
    check(c % 2 == 0 ? y[c] == 0 : y[c] > 0, std::string(k.isa) + " softmax with a mask");
  }
  check(std::fabs(total - 1) < 1e-5, std::string(k.isa) + " softmax with a mask adds up");
  std::fill(x.begin(), x.begin() + columns, -std::numeric_limits<T>::infinity());
  k.softmax_forward(false, false, 1, columns, x.data(), y.data(), {});
  check(std::isnan(y[0]) && std::isnan(y[columns - 1]), std::string(k.isa) + " softmax of nothing");
  k.softmax_forward(false, true, 1, columns, x.data(), y.data(), {});
  for (const T v : y) check(v == 0, std::string(k.isa) + " safe softmax of nothing");
}

struct TestSoftmax {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const bool log : {false, true}) {
      for (const Index columns : {1, 2, 5, 16, 17, 40}) {
        for (const Index rows : {1, 3, 8}) check_rows(k, log, rows, columns, 1);
      }
      check_rows(k, log, 4, 5, 30);
    }
    check_masked(k);
  }
};

}  // namespace

int main() {
  for_each_table(TestSoftmax());
  return report("softmax");
}
