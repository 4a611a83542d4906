// What this machine can do, measured.
#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "fastmaml/core.h"

namespace fastmaml {

double fma_peak(int threads) {
  constexpr Index kRounds = 1000000;  // a few milliseconds
  constexpr int kRepeats = 40;        // the best one was disturbed least
  const Kernels<float>& table = kernels<float>();
  std::vector<double> flop(static_cast<std::size_t>(std::max(threads, 1)));
  double best = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    ThreadPool::instance().run(static_cast<int>(flop.size()), [&](int thread) {
      flop[static_cast<std::size_t>(thread)] = table.fma_rounds(kRounds);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double total = 0;
    for (double one : flop) total += one;
    best = std::max(best, total / seconds.count() / 1e9);
  }
  return best;
}

}  // namespace fastmaml
