// GFLOP/s of the dense kernels, in useful multiplications, and the share of the measured peak of
// fused multiply-adds. Usage: bench_kernels [isa ...]
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using fastmaml::ConvGeometry;
using fastmaml::ConvPlan;
using fastmaml::Index;
using fastmaml::Kernels;
using fastmaml::padded;

// Of this process: what others do on the machine meanwhile does not count.
double seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

struct Rate {
  double gflops, share;  // of the measured peak
};

// The fastest of many short batches, which take turns with short batches of the peak: clocks wander
// and neighbours come and go.
template <typename Call>
Rate measure(const Kernels<float>& k, double flop, Call call) {
  constexpr double kBatch = 5e-4;
  constexpr int kBatches = 100;
  constexpr Index kRounds = 20000;
  call();
  double start = seconds();
  call();
  const int calls = static_cast<int>(kBatch / (seconds() - start + 1e-6)) + 1;
  double best = 0, peak = 0;
  for (int batch = 0; batch < kBatches; ++batch) {
    start = seconds();
    for (int i = 0; i < calls; ++i) call();
    best = std::max(best, flop * calls / (seconds() - start));
    start = seconds();
    const double peak_flop = k.fma_rounds(kRounds);
    peak = std::max(peak, peak_flop / (seconds() - start));
  }
  return {best / 1e9, best / peak};
}

// Vector-aligned memory with small values in it.
class Buffer {
 public:
  explicit Buffer(Index count) : storage_(static_cast<std::size_t>(count) + 16) {
    for (std::size_t i = 0; i < storage_.size(); ++i)
      storage_[i] = 0.01f * static_cast<float>(i % 97);
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    start_ = storage_.data() + (64 - address % 64) % 64 / sizeof(float);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() { return start_; }

 private:
  std::vector<float> storage_;
  float* start_;
};

template <typename Call>
void print(const Kernels<float>& k, double flop, Call call) {
  const Rate rate = measure(k, flop, call);
  std::printf(" %6.1f (%3.0f %%)", rate.gflops, 100 * rate.share);
}

struct Shape {
  int in, out, size, stride;
  Index images;
};

double useful_flop(const ConvGeometry& g, Index images) {
  double products = 0;
  for (int axis_h = 0; axis_h < g.out_height * g.kernel_h; ++axis_h) {
    const int h = axis_h / g.kernel_h * g.stride_h + axis_h % g.kernel_h - g.pad_h;
    if (h < 0 || h >= g.height) continue;
    for (int axis_w = 0; axis_w < g.out_width * g.kernel_w; ++axis_w) {
      const int w = axis_w / g.kernel_w * g.stride_w + axis_w % g.kernel_w - g.pad_w;
      if (w >= 0 && w < g.width) products += 1;
    }
  }
  return 2 * products * static_cast<double>(images) * g.in_channels * g.out_channels;
}

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
