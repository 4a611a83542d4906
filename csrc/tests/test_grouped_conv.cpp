// Convolution in groups against plain loops in double precision.
#include "check.h"
#include "conv_cases.h"
#include "grouped_conv_plan.h"

namespace {

using namespace fastmaml_test;
using fastmaml::ConvGeometry;
using fastmaml::GroupedConvPlan;
using fastmaml::GroupedSweep;
using fastmaml::padded;

struct Case {
  Index groups, images;
  ConvGeometry g;
};

// `in` and `out`: channels of a group.
Case make_case(int groups, int in, int out, int height, int width, int kh, int kw, int sh, int sw,
               int ph, int pw, int dh, int dw, Index images) {
  const int channels = groups * in, outputs = groups * out;
  return {groups, images,
          conv_geometry(channels, outputs, height, width, kh, kw, sh, sw, ph, pw, dh, dw)};
}

// Rows of groups: an image's places, plane by plane, and the weights of each tap.
struct Rows {
  explicit Rows(const Case& c)
      : g(c.g), images(c.images), in(g.in_channels / c.groups), out(g.out_channels / c.groups) {}

  Index inputs() const { return images * in * g.height * g.width; }
  Index outputs() const { return images * out * g.out_height * g.out_width; }
  Index weights() const { return Index{g.kernel_h} * g.kernel_w * in * out; }

  // body(output row, input row, weight row) for every product of each group
  template <typename Body>
  void for_products(Body body) const {
    fastmaml_test::for_products(g, 1, [&](Index to, Index from, Index tap) {
      for (Index i = 0; i < images * out * in; ++i) {
        const Index image = i / in / out, plane = i / in % out, source = i % in;
        body((image * out + plane) * g.out_height * g.out_width + to,
             (image * in + source) * g.height * g.width + from, (tap * out + plane) * in + source);
      }
    });
  }

  ConvGeometry g;
  Index images, in, out;
};

template <typename T>
using Values = std::vector<T>;

// Sums of so many random products.
template <typename T>
void check_sums(const Values<T>& got, const Values<double>& expected, Index products,
                const std::string& name) {
  const double typical = std::sqrt(static_cast<double>(2 * products));
  check_close(got, expected, 40 + typical, name, typical);
}

// What a kernel adds to: memory that it must overwrite, or values.
template <typename T>
Values<T> start(Index count, bool accumulate, Values<double>* expected) {
  Values<T> values = accumulate ? random_values<T>(count) : poisoned<T>(count);
  expected->assign(count, 0);
  if (accumulate) expected->assign(values.begin(), values.end());
  return values;
}

template <typename T>
void add_product(Values<double>* sums, Index to, Index ld, const Values<T>& a, Index row_a,
                 const Values<T>& b, Index row_b) {
  for (Index i = 0; i < ld; ++i) {
    (*sums)[to * ld + i] += static_cast<double>(a[row_a * ld + i]) * b[row_b * ld + i];
  }
}

struct TestGroupedConv {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    // groups, channels of one; height, width; kernel; stride; padding; dilation; images
    const Case cases[] = {
        make_case(32, 1, 1, 14, 14, 3, 3, 1, 1, 1, 1, 1, 1, 3),
        make_case(17, 1, 1, 9, 12, 3, 3, 2, 2, 1, 1, 1, 1, 2),
        make_case(33, 1, 2, 7, 5, 5, 5, 1, 1, 2, 2, 1, 1, 2),
        make_case(5, 3, 2, 6, 11, 2, 4, 1, 3, 0, 2, 1, 1, 3),
        make_case(16, 4, 4, 8, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1),
        make_case(3, 2, 3, 10, 13, 3, 2, 2, 3, 2, 1, 2, 3, 2),
        make_case(1, 2, 2, 4, 5, 3, 3, 1, 1, 1, 1, 1, 1, 2),
        make_case(8, 1, 1, 1, 1, 3, 3, 1, 1, 1, 1, 1, 1, 4),
        make_case(9, 1, 1, 5, 4, 1, 1, 3, 3, 0, 0, 1, 1, 2),
        make_case(20, 1, 1, 6, 17, 7, 7, 1, 1, 3, 3, 1, 1, 1),
        make_case(4, 1, 1, 9, 9, 3, 3, 4, 4, 0, 0, 1, 1, 2),
    };
    for (const Case& c : cases) {
      for (const bool dual : {false, true}) run(k, c, dual);
    }
  }

  // `dual`: two products, added to what is there.
  template <typename T>
  static void run(const Kernels<T>& k, const Case& c, bool dual) {
    const Rows rows(c);
    const GroupedConvPlan plan(c.g, c.groups);
    const Index ld = padded(c.groups, k.lanes);
    const auto random = [&](Index count) { return random_rows<T>(count, c.groups, ld); };
    const Values<T> x = random(rows.inputs()), x2 = random(rows.inputs());
    const Values<T> w = random(rows.weights()), w2 = random(rows.weights());
    const Values<T> gy = random(rows.outputs()), gy2 = random(rows.outputs());
    const Values<T> bias = random(rows.out);
    const auto second = [&](const Values<T>& v) { return dual ? v.data() : nullptr; };
    const std::string name =
        std::string(k.isa) + " " + scalar_name<T>() + " " + describe(c) + (dual ? " dual" : "");

    Values<double> expected;
    Values<T> y = start<T>(rows.outputs() * ld, dual, &expected);
    for (Index i = 0; !dual && i < rows.outputs(); ++i) {
      const Index plane = i / c.g.out_height / c.g.out_width % rows.out;
      for (Index lane = 0; lane < ld; ++lane) expected[i * ld + lane] += bias[plane * ld + lane];
    }
    rows.for_products([&](Index out, Index in, Index weight) {
      add_product(&expected, out, ld, x, in, w, weight);
      if (dual) add_product(&expected, out, ld, x2, in, w2, weight);
    });
    check_shares(&y, "forward " + name, [&](Share share) {
      k.grouped_conv_sweep(plan.forward(), c.images, x.data(), w.data(), second(x2), second(w2),
                           dual ? nullptr : bias.data(), y.data(), dual, share);
    });
    check_sums(y, expected, rows.weights(), "forward " + name);

    Values<T> gx = start<T>(rows.inputs() * ld, dual, &expected);
    rows.for_products([&](Index out, Index in, Index weight) {
      add_product(&expected, in, ld, gy, out, w, weight);
      if (dual) add_product(&expected, in, ld, gy2, out, w2, weight);
    });
    check_shares(&gx, "input grad " + name, [&](Share share) {
      k.grouped_conv_sweep(plan.input_grad(), c.images, gy.data(), w.data(), second(gy2),
                           second(w2), nullptr, gx.data(), dual, share);
    });
    check_sums(gx, expected, rows.weights(), "input grad " + name);

    Values<T> gw = start<T>(rows.weights() * ld, dual, &expected);
    rows.for_products([&](Index out, Index in, Index weight) {
      add_product(&expected, weight, ld, x, in, gy, out);
      if (dual) add_product(&expected, weight, ld, x2, in, gy2, out);
    });
    check_shares(&gw, "weight grad " + name, [&](Share share) {
      k.grouped_conv_weight_grad(plan.forward(), c.images, x.data(), gy.data(), second(x2),
                                 second(gy2), gw.data(), dual, share);
    });
    check_sums(gw, expected, rows.outputs(), "weight grad " + name);
  }

  static std::string describe(const Case& c) {
    const ConvGeometry& g = c.g;
    std::string text = std::to_string(c.groups) + " groups";
    for (const int number :
         {g.in_channels, g.out_channels, g.height, g.width, g.kernel_h, g.kernel_w, g.stride_h,
          g.stride_w, g.pad_h, g.pad_w, g.dilation_h, g.dilation_w}) {
      text += " " + std::to_string(number);
    }
    return text;
  }
};

}  // namespace

int main() {
  for_each_table(TestGroupedConv());
  return report("grouped_conv");
}
