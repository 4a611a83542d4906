// Convolution, its input gradient and its weight gradient against plain loops.
#include "check.h"
#include "conv_cases.h"

namespace {

using namespace fastmaml_test;
using fastmaml::ConvGeometry;
using fastmaml::ConvPlan;
using fastmaml::padded;

struct Case {
  ConvGeometry g;
  Index images;
};

Case make_case(int in, int out, int height, int width, int kh, int kw, int sh, int sw, int ph,
               int pw, int dh, int dw, Index images) {
  return {conv_geometry(in, out, height, width, kh, kw, sh, sw, ph, pw, dh, dw), images};
}

template <typename T>
struct Data {
  Index inputs, outputs, ldx, ldi, ldo, taps;
  std::vector<T> x, x2, gy, gy2, w, w2, wt, wt2, bias;
};

template <typename T>
Data<T> make_data(const Kernels<T>& k, const Case& c, bool unpadded) {
  const ConvGeometry& g = c.g;
  Data<T> d;
  d.inputs = c.images * g.height * g.width;
  d.outputs = c.images * g.out_height * g.out_width;
  d.ldi = padded(g.in_channels, k.lanes);
  d.ldo = padded(g.out_channels, k.lanes);
  d.ldx = unpadded ? g.in_channels : d.ldi;
  d.taps = g.kernel_h * g.kernel_w;
  d.x = random_rows<T>(d.inputs, g.in_channels, d.ldx, true);
  d.x2 = random_rows<T>(d.inputs, g.in_channels, d.ldx, true);
  d.gy = random_rows<T>(d.outputs, g.out_channels, d.ldo);
  d.gy2 = random_rows<T>(d.outputs, g.out_channels, d.ldo);
  d.w = random_rows<T>(d.taps * g.in_channels, g.out_channels, d.ldo);
  d.w2 = random_rows<T>(d.taps * g.in_channels, g.out_channels, d.ldo);
  d.bias = random_rows<T>(1, g.out_channels, d.ldo);
  d.wt = poisoned<T>(d.taps * g.out_channels * d.ldi);
  d.wt2 = d.wt;
  k.transpose(d.taps, g.in_channels, g.out_channels, d.w.data(), d.wt.data(), {});
  k.transpose(d.taps, g.in_channels, g.out_channels, d.w2.data(), d.wt2.data(), {});
  return d;
}

// Sums of that many random products, or twice as many.
template <typename T>
void check_sums(const std::vector<T>& got, const std::vector<double>& expected, Index products,
                bool dual, const std::string& name) {
  const double typical = std::sqrt(static_cast<double>(dual ? 2 * products : products));
  check_close(got, expected, 40 + typical, name, typical);
}

template <typename T>
void check_forward(const Kernels<T>& k, const Case& c, const ConvPlan& plan, const Data<T>& d,
                   bool dual, const std::string& name) {
  const ConvGeometry& g = c.g;
  std::vector<double> expected(static_cast<std::size_t>(d.outputs * d.ldo));
  for (Index i = 0; i < d.outputs * d.ldo; ++i) expected[i] = dual ? 0 : d.bias[i % d.ldo];
  for_products(g, c.images, [&](Index out, Index in, Index tap) {
    for (int i = 0; i < g.in_channels; ++i) {
      for (int o = 0; o < g.out_channels; ++o) {
        const Index weight = (tap * g.in_channels + i) * d.ldo + o;
        expected[out * d.ldo + o] += static_cast<double>(d.x[in * d.ldx + i]) * d.w[weight];
        if (dual)
          expected[out * d.ldo + o] += static_cast<double>(d.x2[in * d.ldx + i]) * d.w2[weight];
      }
    }
  });
  std::vector<T> y = poisoned<T>(d.outputs * d.ldo);
  check_shares(&y, name, [&](Share share) {
    k.conv_forward(plan, d.x.data(), d.ldx, d.w.data(), dual ? d.x2.data() : nullptr,
                   dual ? d.w2.data() : nullptr, dual ? nullptr : d.bias.data(), y.data(), share);
  });
  check_sums(y, expected, d.taps * g.in_channels, dual, name);
}

template <typename T>
void check_input_grad(const Kernels<T>& k, const Case& c, const ConvPlan& plan, const Data<T>& d,
                      bool dual, const std::string& name) {
  const ConvGeometry& g = c.g;
  const bool accumulate = dual;
  std::vector<T> gx =
      accumulate ? random_values<T>(d.inputs * d.ldi) : poisoned<T>(d.inputs * d.ldi);
  std::vector<double> expected(gx.size(), 0);
  if (accumulate) expected.assign(gx.begin(), gx.end());
  for_products(g, c.images, [&](Index out, Index in, Index tap) {
    for (int i = 0; i < g.in_channels; ++i) {
      for (int o = 0; o < g.out_channels; ++o) {
        const Index weight = (tap * g.in_channels + i) * d.ldo + o;
        expected[in * d.ldi + i] += static_cast<double>(d.gy[out * d.ldo + o]) * d.w[weight];
        if (dual)
          expected[in * d.ldi + i] += static_cast<double>(d.gy2[out * d.ldo + o]) * d.w2[weight];
      }
    }
  });
  check_shares(&gx, name, [&](Share share) {
    k.conv_input_grad(plan, d.gy.data(), d.wt.data(), dual ? d.gy2.data() : nullptr,
                      dual ? d.wt2.data() : nullptr, gx.data(), accumulate, share);
  });
  check_sums(gx, expected, d.taps * g.out_channels, dual, name);
}

template <typename T>
void check_weight_grad(const Kernels<T>& k, const Case& c, const ConvPlan& plan, const Data<T>& d,
                       bool dual, const std::string& name) {
  const ConvGeometry& g = c.g;
  const bool accumulate = dual;
  const Index size = d.taps * g.in_channels * d.ldo;
  std::vector<T> gw = accumulate ? random_values<T>(size) : poisoned<T>(size);
  std::vector<double> expected(gw.size(), 0);
  if (accumulate) expected.assign(gw.begin(), gw.end());
  for_products(g, c.images, [&](Index out, Index in, Index tap) {
    for (int i = 0; i < g.in_channels; ++i) {
      for (int o = 0; o < g.out_channels; ++o) {
        double& sum = expected[(tap * g.in_channels + i) * d.ldo + o];
        sum += static_cast<double>(d.x[in * d.ldx + i]) * d.gy[out * d.ldo + o];
        if (dual) sum += static_cast<double>(d.x2[in * d.ldx + i]) * d.gy2[out * d.ldo + o];
      }
    }
  });
  check_shares(&gw, name, [&](Share share) {
    k.conv_weight_grad(plan, d.x.data(), d.ldx, d.gy.data(), dual ? d.x2.data() : nullptr,
                       dual ? d.gy2.data() : nullptr, gw.data(), accumulate, share);
  });
  check_sums(gw, expected, d.outputs, dual, name);
}

std::string describe(const Case& c) {
  const ConvGeometry& g = c.g;
  char text[160];
  std::snprintf(
      text, sizeof text, "%lld x %dx%d %d->%d kernel %dx%d stride %d,%d pad %d,%d dil %d,%d",
      static_cast<long long>(c.images), g.height, g.width, g.in_channels, g.out_channels,
      g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.pad_h, g.pad_w, g.dilation_h, g.dilation_w);
  return text;
}

const Case kCases[] = {
    make_case(1, 64, 28, 28, 3, 3, 2, 2, 1, 1, 1, 1, 5),
    make_case(64, 64, 14, 14, 3, 3, 2, 2, 1, 1, 1, 1, 5),
    make_case(64, 64, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1, 7),
    make_case(3, 32, 33, 47, 3, 3, 1, 1, 1, 1, 1, 1, 2),
    make_case(32, 32, 21, 21, 3, 3, 1, 1, 1, 1, 1, 1, 3),
    make_case(32, 32, 10, 10, 3, 3, 1, 1, 1, 1, 1, 1, 9),
    make_case(17, 48, 9, 13, 3, 3, 1, 1, 1, 1, 1, 1, 3),
    make_case(20, 100, 9, 7, 3, 3, 1, 1, 0, 2, 1, 1, 4),
    make_case(72, 9, 4, 11, 3, 3, 1, 1, 2, 0, 1, 1, 5),
    make_case(48, 17, 11, 8, 2, 4, 2, 1, 0, 2, 1, 1, 2),
    make_case(5, 100, 12, 7, 5, 1, 1, 3, 2, 0, 1, 1, 2),
    make_case(100, 5, 6, 6, 1, 5, 3, 2, 0, 1, 1, 1, 4),
    make_case(3, 3, 10, 11, 3, 2, 2, 3, 2, 1, 2, 3, 3),
    make_case(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 1, 1),
    make_case(5, 3, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 2),
    make_case(64, 48, 5, 5, 5, 5, 1, 1, 0, 0, 1, 1, 3),
    make_case(17, 5, 4, 3, 1, 1, 3, 3, 0, 0, 1, 1, 5),
    make_case(2, 7, 12, 12, 9, 9, 1, 1, 4, 4, 1, 1, 1),
    // Few channels beyond the last whole vector.
    make_case(1, 17, 28, 28, 3, 3, 2, 2, 1, 1, 1, 1, 3),
    make_case(17, 17, 14, 14, 3, 3, 2, 2, 1, 1, 1, 1, 5),
    make_case(17, 33, 5, 4, 3, 3, 2, 2, 1, 1, 1, 1, 2),
    make_case(3, 18, 21, 21, 3, 3, 1, 1, 1, 1, 1, 1, 3),
    make_case(33, 17, 13, 12, 3, 3, 1, 1, 1, 1, 1, 1, 4),
    make_case(65, 18, 6, 7, 3, 3, 1, 1, 1, 0, 1, 1, 1),
    make_case(18, 65, 9, 9, 5, 3, 1, 2, 2, 1, 1, 2, 3),
    make_case(35, 34, 7, 6, 1, 1, 1, 1, 0, 0, 1, 1, 5),
    make_case(200, 17, 6, 6, 5, 5, 1, 1, 2, 2, 1, 1, 1),
};

struct TestConv {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    bool skip = false;
    for (const Case& c : kCases) {
      skip = few_cases() && !skip;
      if (skip) continue;
      ConvPlan* plan = k.conv_plan(c.g, c.images);
      for (const bool unpadded : {false, true}) {
        const Data<T> d = make_data(k, c, unpadded);
        for (const bool dual : {false, true}) {
          const std::string name = std::string(k.isa) + " " + scalar_name<T>() + " " + describe(c) +
                                   (dual ? " dual" : "") + (unpadded ? " unpadded" : "");
          check_forward(k, c, *plan, d, dual, "forward " + name);
          check_weight_grad(k, c, *plan, d, dual, "weight grad " + name);
          if (!unpadded) check_input_grad(k, c, *plan, d, dual, "input grad " + name);
        }
      }
      k.conv_plan_free(plan);
    }
  }
};

}  // namespace

int main() {
  for_each_table(TestConv());
  return report("conv2d");
}
