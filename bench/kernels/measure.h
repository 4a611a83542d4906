// What the benchmarks of kernels share: memory, a clock, rates.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "kernels.h"

namespace fastmaml::bench {

// Of this process: what others do on the machine meanwhile does not count.
inline double seconds() { return static_cast<double>(std::clock()) / CLOCKS_PER_SEC; }

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
  explicit Buffer(Index count) : storage_(static_cast<std::size_t>(count) + 16), count_(count) {
    for (std::size_t i = 0; i < storage_.size(); ++i)
      storage_[i] = 0.01f * static_cast<float>(i % 97) - 0.4f;
    const auto address = reinterpret_cast<std::uintptr_t>(storage_.data());
    start_ = storage_.data() + (64 - address % 64) % 64 / sizeof(float);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* data() { return start_; }
  Index count() const { return count_; }

 private:
  std::vector<float> storage_;
  Index count_;
  float* start_;
};

// The multiplications and additions of a convolution, without those on padding.
inline double useful_flop(const ConvGeometry& g, Index images) {
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

// One rung of a ladder: what it computes must be what the first rung computed.
class Ladder {
 public:
  Ladder(const Kernels<float>& kernels, double flop) : kernels_(kernels), flop_(flop) {}

  template <typename Call>
  void rung(const char* name, Buffer& result, Call call) {
    rung(name, result, call, [] {});
  }
  // `arrange`, which takes no part in the time, brings what `call` computed to `result`.
  template <typename Call, typename Arrange>
  void rung(const char* name, Buffer& result, Call call, Arrange arrange) {
    call();
    arrange();
    check(name, result);
    const Rate rate = measure(kernels_, flop_, call);
    if (first_ == 0) first_ = rate.gflops;
    std::printf("  %-58s %7.2f GFLOP/s %5.0f %% of peak %7.1fx\n", name, rate.gflops,
                100 * rate.share, rate.gflops / first_);
    std::fflush(stdout);
  }

 private:
  void check(const char* name, Buffer& result) {
    if (expected_.empty()) expected_.assign(result.data(), result.data() + result.count());
    double error = 0, size = 0;
    for (Index i = 0; i < result.count(); ++i) {
      error = std::max(error, std::abs(static_cast<double>(result.data()[i]) - expected_[i]));
      size = std::max(size, std::abs(static_cast<double>(expected_[i])));
    }
    if (!(error <= 1e-4 * size)) {
      std::printf("  %s is wrong: off by %.1e of %.1e\n", name, error, size);
      std::exit(1);
    }
  }

  const Kernels<float>& kernels_;
  double flop_;
  double first_ = 0;
  std::vector<float> expected_;
};

}  // namespace fastmaml::bench
