// Batch norm, ReLU and a 2x2 max-pool behind a convolution on large images: as three ops, each with
// its passes through memory, and as one.
#include <cstdio>
#include <vector>

#include "measure.h"

namespace {

using fastmaml::Activation;
using fastmaml::Index;
using fastmaml::Kernels;
using fastmaml::NormReluShape;
using fastmaml::NormReluState;
using fastmaml::PoolGeometry;
using fastmaml::bench::Buffer;
using fastmaml::bench::Ladder;

constexpr float kEps = 1e-5f;

PoolGeometry pool_of_two(int size) {
  PoolGeometry g = {size, size, size / 2, size / 2, 1, 1, {}};
  for (int i = 0; i < g.out_height * g.out_width; ++i) {
    const int h = i / g.out_width * 2, w = i % g.out_width * 2;
    g.windows.push_back({h, h + 2, w, w + 2, 1.0});
  }
  return g;
}

void climb(const Kernels<float>& k, int size, Index channels, Index images) {
  const Index rows = images * size * size, inner = rows * channels, outer = inner / 4;
  Buffer x(inner), xhat(inner), y(inner), pooled(outer), origin(outer);
  Buffer gamma(channels), beta(channels), mean(channels), variance(channels), scale(channels);
  std::vector<std::int32_t> argmax(static_cast<std::size_t>(outer));
  const PoolGeometry pool = pool_of_two(size);
  const NormReluShape shape = {images, size, size, 2, channels};
  const NormReluState<float> state = {x.data(),        gamma.data(), beta.data(),   mean.data(),
                                      variance.data(), scale.data(), pooled.data(), origin.data()};
  std::printf("forward: %dx%d, %lld channels, %lld images\n", size, size,
              static_cast<long long>(channels), static_cast<long long>(images));
  // mean, variance, x-hat, y, maximum: about eight operations an element
  Ladder ladder(k, 8.0 * static_cast<double>(inner));
  ladder.rung("batch norm, ReLU, max-pool one after the other", pooled, [&] {
    k.norm_forward(rows, channels, x.data(), gamma.data(), beta.data(), kEps, xhat.data(), y.data(),
                   mean.data(), variance.data(), scale.data(), {});
    k.act_forward(Activation::kRelu, 0, 0, inner, y.data(), y.data(), {});
    k.max_pool_forward(pool, images, channels, y.data(), pooled.data(), argmax.data(), {});
  });
  ladder.rung("as one: x is read twice, only the maxima are written", pooled,
              [&] { k.norm_relu_forward(shape, state, kEps, {}); });
}

}  // namespace

int main() {
  const Kernels<float>& k = fastmaml::kernels<float>();
  climb(k, 84, 32, 5);
  climb(k, 42, 32, 5);
  climb(k, 42, 48, 2);
  return 0;
}
