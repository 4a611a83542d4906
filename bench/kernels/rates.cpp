// GFLOP/s of the dense kernels, in useful multiplications, and the share of the measured peak of
// fused multiply-adds. Usage: bench_rates [isa ...]
#include <cstdio>
#include <string>

#include "measure.h"

namespace {

using fastmaml::ConvGeometry;
using fastmaml::ConvPlan;
using fastmaml::Index;
using fastmaml::Kernels;
using fastmaml::padded;
using fastmaml::bench::Buffer;
using fastmaml::bench::measure;
using fastmaml::bench::Rate;
using fastmaml::bench::useful_flop;

template <typename Call>
void print(const Kernels<float>& k, double flop, Call call) {
  const Rate rate = measure(k, flop, call);
  std::printf(" %6.1f (%3.0f %%)", rate.gflops, 100 * rate.share);
}

struct Shape {
  int in, out, size, stride;
  Index images;
};

void bench_conv(const Kernels<float>& k, const Shape& s) {
  const int out_size = (s.size - 1) / s.stride + 1;
  const ConvGeometry g = {s.in, s.out,    s.size,   s.size, out_size, out_size, 3,
                          3,    s.stride, s.stride, 1,      1,        1,        1};
  const Index inputs = s.images * s.size * s.size, outputs = s.images * out_size * out_size;
  const Index ldi = padded(s.in, k.lanes), ldo = padded(s.out, k.lanes);
  const Index ldx = s.in < 8 ? s.in : ldi;
  Buffer x(inputs * ldi), x2(inputs * ldi), gx(inputs * ldi), y(outputs * ldo), gy(outputs * ldo);
  Buffer gy2(outputs * ldo), w(9 * s.in * ldo), w2(9 * s.in * ldo), gw(9 * s.in * ldo);
  Buffer wt(9 * s.out * ldi), wt2(9 * s.out * ldi);
  ConvPlan* plan = k.conv_plan(g, s.images);
  const double flop = useful_flop(g, s.images);
  std::printf("%-9s %3dx%-3d %3d->%-3d s%d n%-2d |", k.isa, s.size, s.size, s.in, s.out, s.stride,
              static_cast<int>(s.images));
  for (const bool dual : {false, true}) {
    const float* none = nullptr;
    const double work = dual ? 2 * flop : flop;
    print(k, work, [&] {
      k.conv_forward(*plan, x.data(), ldx, w.data(), dual ? x2.data() : none,
                     dual ? w2.data() : none, none, y.data(), {});
    });
    print(k, work, [&] {
      k.conv_input_grad(*plan, gy.data(), wt.data(), dual ? gy2.data() : none,
                        dual ? wt2.data() : none, gx.data(), false, {});
    });
    print(k, work, [&] {
      k.conv_weight_grad(*plan, x.data(), ldx, gy.data(), dual ? x2.data() : none,
                         dual ? gy2.data() : none, gw.data(), false, {});
    });
    std::printf(" |");
  }
  std::printf("\n");
  std::fflush(stdout);
  k.conv_plan_free(plan);
}

void bench_matmul(const Kernels<float>& k, Index rows, Index in, Index out) {
  const Index ld = padded(out, k.lanes), lda = padded(in, k.lanes);
  Buffer a(rows * lda), b(in * ld), c(rows * ld), gb(in * ld);
  const double flop = 2.0 * static_cast<double>(rows * in * out);
  const float* none = nullptr;
  std::printf("%-9s matmul %lld x %lld x %lld |", k.isa, static_cast<long long>(rows),
              static_cast<long long>(in), static_cast<long long>(out));
  print(k, flop, [&] {
    k.matmul(rows, in, out, a.data(), lda, b.data(), none, 0, none, none, c.data(), false, {});
  });
  print(k, flop, [&] {
    k.matmul_tn(rows, in, out, a.data(), lda, c.data(), none, 0, none, gb.data(), false, {});
  });
  std::printf("\n");
}

const Shape kShapes[] = {
    {1, 64, 28, 2, 5},  {64, 64, 14, 2, 5}, {64, 64, 7, 2, 5},    {64, 64, 4, 2, 5},
    {3, 32, 84, 1, 5},  {32, 32, 42, 1, 5}, {32, 32, 21, 1, 5},   {32, 32, 10, 1, 5},
    {32, 32, 84, 1, 2}, {64, 64, 42, 1, 2}, {64, 64, 14, 2, 75},  {17, 17, 20, 1, 5},
    {48, 48, 20, 1, 5}, {48, 48, 33, 2, 5}, {128, 128, 10, 1, 5}, {64, 64, 4, 2, 1},
};

}  // namespace

int main(int argc, char** argv) {
  std::printf(
      "GFLOP/s (share of the measured peak): forward, input grad, weight grad | the same, two "
      "products each\n");
  for (const std::string& isa : fastmaml::runnable_isas()) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || isa == argv[i];
    if (!wanted) continue;
    const Kernels<float>& k = fastmaml::kernels_for<float>(isa);
    for (const Shape& shape : kShapes) bench_conv(k, shape);
    for (const Index rows : {5, 75}) {
      bench_matmul(k, rows, 64, 5);
      bench_matmul(k, rows, 800, 5);
      bench_matmul(k, rows, 784, 256);
      bench_matmul(k, rows, 256, 128);
    }
  }
  return 0;
}
