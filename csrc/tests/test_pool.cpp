// Pooling and its derivatives against plain loops.
#include "check.h"

namespace {

using namespace fastmaml_test;
using fastmaml::PoolGeometry;
using fastmaml::PoolWindow;

struct Case {
  int height, width, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, step_h, step_w;
};

PoolGeometry make_geometry(const Case& c) {
  PoolGeometry g;
  g.height = c.height;
  g.width = c.width;
  g.step_h = c.step_h;
  g.step_w = c.step_w;
  const int span_h = c.step_h * (c.kernel_h - 1) + 1, span_w = c.step_w * (c.kernel_w - 1) + 1;
  g.out_height = (c.height + 2 * c.pad_h - span_h) / c.stride_h + 1;
  g.out_width = (c.width + 2 * c.pad_w - span_w) / c.stride_w + 1;
  for (int h = 0; h < g.out_height; ++h) {
    for (int w = 0; w < g.out_width; ++w) {
      PoolWindow window{h * c.stride_h - c.pad_h, 0, w * c.stride_w - c.pad_w, 0, 0};
      window.h1 = std::min(window.h0 + span_h, c.height);
      window.w1 = std::min(window.w0 + span_w, c.width);
      while (window.h0 < 0) window.h0 += c.step_h;
      while (window.w0 < 0) window.w0 += c.step_w;
      window.scale = 1.0 / (c.kernel_h * c.kernel_w);
      g.windows.push_back(window);
    }
  }
  return g;
}

// body(output position, input position) over every window.
template <typename Body>
void for_windows(const PoolGeometry& g, Body body) {
  for (std::size_t out = 0; out < g.windows.size(); ++out) {
    const PoolWindow& window = g.windows[out];
    for (int h = window.h0; h < window.h1; h += g.step_h) {
      for (int w = window.w0; w < window.w1; w += g.step_w) {
        body(static_cast<Index>(out), Index{h} * g.width + w);
      }
    }
  }
}

template <typename T>
void check_max(const Kernels<T>& k, const PoolGeometry& g, Index images, Index ld,
               const std::string& name) {
  const Index inputs = g.height * g.width, outputs = g.out_height * g.out_width;
  auto x = random_values<T>(images * inputs * ld);
  for (T& v : x) v = std::round(v * 2) / 2;  // ties: the first one wins
  x[0] = static_cast<T>(NAN);                // stays one
  const auto dx = random_values<T>(x.size()), gy = random_values<T>(images * outputs * ld);
  const auto start = random_values<T>(x.size());
  std::vector<std::int32_t> where(gy.size(), -1), argmax(gy.size(), -7);
  std::vector<double> y(gy.size()), dy(gy.size()), gx(x.size(), 0);
  for (Index image = 0; image < images; ++image) {
    for_windows(g, [&](Index out, Index in) {
      for (Index c = 0; c < ld; ++c) {
        const Index o = (image * outputs + out) * ld + c;
        const T value = x[(image * inputs + in) * ld + c];
        if (where[o] >= 0 && !(value > y[o]) && !std::isnan(value)) continue;
        where[o] = static_cast<std::int32_t>(in);
        y[o] = value;
      }
    });
  }
  for (std::size_t o = 0; o < y.size(); ++o) {
    const std::size_t image = o / (outputs * ld);
    const std::size_t in = (image * inputs + where[o]) * ld + o % ld;
    dy[o] = dx[in];
    gx[in] += gy[o];
  }
  std::vector<T> out = poisoned<T>(gy.size());
  check_shares(&out, name + " max", [&](Share s) {
    k.max_pool_forward(g, images, ld, x.data(), out.data(), argmax.data(), s);
  });
  check(argmax == where, name + " argmax");
  for (std::size_t o = 0; o < y.size(); ++o) {
    check(out[o] == y[o] || (std::isnan(out[o]) && std::isnan(y[o])), name + " max value");
  }
  check_shares(&out, name + " max tangent", [&](Share s) {
    k.max_pool_tangent(g, images, ld, argmax.data(), dx.data(), out.data(), s);
  });
  check_close(out, dy, 0, name + " max tangent");
  std::vector<T> back = poisoned<T>(x.size());
  check_shares(&back, name + " max backward", [&](Share s) {
    k.max_pool_backward(g, images, ld, argmax.data(), gy.data(), back.data(), false, s);
  });
  check_close(back, gx, 8, name + " max backward", 1);
  back = start;
  for (std::size_t i = 0; i < gx.size(); ++i) gx[i] += start[i];
  check_shares(&back, name + " max backward", [&](Share s) {
    k.max_pool_backward(g, images, ld, argmax.data(), gy.data(), back.data(), true, s);
  });
  check_close(back, gx, 8, name + " max backward added", 1);
}

template <typename T>
void check_average(const Kernels<T>& k, const PoolGeometry& g, Index images, Index ld, Index ldx,
                   const std::string& name) {
  const Index inputs = g.height * g.width, outputs = g.out_height * g.out_width;
  const auto x = random_values<T>(images * inputs * ldx);
  const auto gy = random_values<T>(images * outputs * ld);
  std::vector<T> back = random_values<T>(images * inputs * ld);
  std::vector<double> y(gy.size(), 0), gx(back.begin(), back.end()), fresh(back.size(), 0);
  for (Index image = 0; image < images; ++image) {
    for_windows(g, [&](Index out, Index in) {
      for (Index c = 0; c < ld; ++c) {
        const Index o = (image * outputs + out) * ld + c, i = (image * inputs + in) * ld + c;
        if (c < ldx) y[o] += g.windows[out].scale * x[(image * inputs + in) * ldx + c];
        gx[i] += g.windows[out].scale * gy[o];
        fresh[i] += g.windows[out].scale * gy[o];
      }
    });
  }
  std::vector<T> out = poisoned<T>(gy.size());
  check_shares(&out, name + " average",
               [&](Share s) { k.avg_pool_forward(g, images, ld, ldx, x.data(), out.data(), s); });
  check_close(out, y, 20, name + " average");
  check_shares(&back, name + " average backward", [&](Share s) {
    k.avg_pool_backward(g, images, ld, gy.data(), back.data(), true, s);
  });
  check_close(back, gx, 20, name + " average backward added");
  check_shares(&back, name + " average backward", [&](Share s) {
    k.avg_pool_backward(g, images, ld, gy.data(), back.data(), false, s);
  });
  check_close(back, fresh, 20, name + " average backward");
}

const Case kCases[] = {
    {8, 8, 2, 2, 2, 2, 0, 0, 1, 1}, {21, 10, 2, 2, 2, 2, 0, 0, 1, 1},
    {7, 9, 3, 3, 2, 1, 1, 1, 1, 1}, {9, 12, 2, 3, 1, 2, 0, 1, 2, 2},
    {1, 1, 1, 1, 1, 1, 0, 0, 1, 1},
};

struct TestPool {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const Case& c : kCases) {
      const PoolGeometry g = make_geometry(c);
      for (const Index channels : {1, 3, 17, 64}) {
        const Index ld = fastmaml::padded(channels, k.lanes);
        const std::string name = std::string(k.isa) + " " + scalar_name<T>() + " pool " +
                                 std::to_string(c.height) + "x" + std::to_string(c.width) + " " +
                                 std::to_string(channels);
        check_max(k, g, 3, ld, name);
        check_max(k, g, 2, channels, name + " unpadded");
        check_average(k, g, 3, ld, ld, name);
        check_average(k, g, 2, ld, channels, name + " unpadded");
      }
    }
  }
};

}  // namespace

int main() {
  for_each_table(TestPool());
  return report("pool");
}
