// A 3x3 convolution of one task's few images, from seven loops to the kernel that is used; then the
// two products of a tangent, one after the other and in one go.
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "measure.h"

namespace {

using fastmaml::ConvGeometry;
using fastmaml::ConvPlan;
using fastmaml::Index;
using fastmaml::Kernels;
using fastmaml::padded;
using fastmaml::bench::Buffer;
using fastmaml::bench::Ladder;
using fastmaml::bench::useful_flop;

// x [n][h][w][in], w [3][3][in][out], y [n][oh][ow][out]; channels are multiples of the vector.
struct Problem {
  ConvGeometry g;
  Index images;

  Index rows() const { return images * g.out_height * g.out_width; }
  Index in_size() const { return images * g.height * g.width * g.in_channels; }
  Index taps() const { return Index{g.kernel_h} * g.kernel_w; }

  // Calls visit(output row, tap, input row) for every product of rows that is not on padding.
  template <typename Visit>
  void for_each_pair(Visit visit) const {
    for (Index row = 0; row < rows(); ++row) {
      const Index image = row / (g.out_height * g.out_width);
      const int oh = static_cast<int>(row / g.out_width % g.out_height);
      const int ow = static_cast<int>(row % g.out_width);
      for (Index tap = 0; tap < taps(); ++tap) {
        const int h = oh * g.stride_h - g.pad_h + static_cast<int>(tap) / g.kernel_w;
        const int w = ow * g.stride_w - g.pad_w + static_cast<int>(tap) % g.kernel_w;
        if (h < 0 || h >= g.height || w < 0 || w >= g.width) continue;
        visit(row, tap, (image * g.height + h) * g.width + w);
      }
    }
  }
};

// One output at a time: a dot product over input channels, its weights far apart.
void dot_products(const Problem& p, const float* x, const float* w, float* y) {
  const int in = p.g.in_channels, out = p.g.out_channels;
  std::fill(y, y + p.rows() * out, 0.0f);
  p.for_each_pair([&](Index row, Index tap, Index input) {
    for (int o = 0; o < out; ++o) {
      float sum = 0;
      for (int c = 0; c < in; ++c) sum += x[input * in + c] * w[(tap * in + c) * out + o];
      y[row * out + o] += sum;
    }
  });
}

// Output channels innermost: the compiler's vectors, but every product reads and writes y.
void channel_vectors(const Problem& p, const float* x, const float* w, float* y) {
  const int in = p.g.in_channels, out = p.g.out_channels;
  std::fill(y, y + p.rows() * out, 0.0f);
  p.for_each_pair([&](Index row, Index tap, Index input) {
    float* __restrict to = y + row * out;
    for (int c = 0; c < in; ++c) {
      const float value = x[input * in + c];
      const float* __restrict weights = w + (tap * in + c) * out;
      for (int o = 0; o < out; ++o) to[o] += value * weights[o];
    }
  });
}

// Every patch copied into a row, padding and all, then one register-tiled product.
void patches(const Kernels<float>& k, const Problem& p, const float* x, const float* w,
             Buffer& unrolled, float* y) {
  const Index in = p.g.in_channels, width = p.taps() * in;
  std::fill(unrolled.data(), unrolled.data() + unrolled.count(), 0.0f);
  p.for_each_pair([&](Index row, Index tap, Index input) {
    std::memcpy(unrolled.data() + row * width + tap * in, x + input * in, sizeof(float) * in);
  });
  k.matmul(p.rows(), width, p.g.out_channels, unrolled.data(), width, w, nullptr, 0, nullptr,
           nullptr, y, false, {});
}

void climb(const Kernels<float>& k, const char* name, const ConvGeometry& g, Index images) {
  const Problem p = {g, images};
  const Index in = g.in_channels, out = padded(g.out_channels, k.lanes);
  Buffer x(p.in_size()), x2(p.in_size()), w(p.taps() * in * out), w2(p.taps() * in * out);
  Buffer y(p.rows() * out), unrolled(p.rows() * p.taps() * in);
  for (Index i = 0; i < x2.count(); ++i) x2.data()[i] *= 0.5f;
  for (Index i = 0; i < w2.count(); ++i) w2.data()[i] *= -0.25f;
  ConvPlan* plan = k.conv_plan(g, images);
  const float* none = nullptr;
  const double flop = useful_flop(g, images);
  const auto convolve = [&](const float* a, const float* b, const float* a2, const float* b2,
                            float* to) {
    k.conv_forward(*plan, a, in, b, a2, b2, nullptr, to, {});
  };

  std::printf("%s: %dx%d, %d -> %d channels, stride %d, %lld images\n", name, g.height, g.width,
              g.in_channels, g.out_channels, g.stride_h, static_cast<long long>(images));
  Ladder forward(k, flop);
  forward.rung("dot products", y, [&] { dot_products(p, x.data(), w.data(), y.data()); });
  forward.rung("vectors of output channels", y,
               [&] { channel_vectors(p, x.data(), w.data(), y.data()); });
  forward.rung("patches in memory, then one product in register tiles", y,
               [&] { patches(k, p, x.data(), w.data(), unrolled, y.data()); });
  forward.rung("the kernel: no patches, nothing on padding, or Winograd", y,
               [&] { convolve(x.data(), w.data(), none, none, y.data()); });

  Buffer second(p.rows() * out);
  Ladder tangent(k, 2 * flop);
  tangent.rung("tangent: two products and their sum", y, [&] {
    convolve(x2.data(), w.data(), none, none, y.data());
    convolve(x.data(), w2.data(), none, none, second.data());
    k.axpby(y.count(), 1.0f, second.data(), 0.0f, none, y.data(), true, {});
  });
  tangent.rung("tangent: both products in the same registers", y,
               [&] { convolve(x2.data(), w.data(), x.data(), w2.data(), y.data()); });
  k.conv_plan_free(plan);
}

}  // namespace

int main() {
  const Kernels<float>& k = fastmaml::kernels<float>();
  climb(k, "Omniglot, second layer", {64, 64, 14, 14, 7, 7, 3, 3, 2, 2, 1, 1, 1, 1}, 5);
  climb(k, "mini-ImageNet, second layer", {32, 32, 42, 42, 42, 42, 3, 3, 1, 1, 1, 1, 1, 1}, 5);
  climb(k, "odd: 48 channels, 20x20", {48, 48, 20, 20, 20, 20, 3, 3, 1, 1, 1, 1, 1, 1}, 5);
  return 0;
}
