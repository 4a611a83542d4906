// What this machine can do, measured.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <thread>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "fastmaml/core.h"

namespace fastmaml {

namespace {

using Clock = std::chrono::steady_clock;

// Thread 0 or 1 of two that write to `ball` in turn, `trips` times each.
void pass_back_and_forth(std::atomic<int>* ball, int thread, int trips) {
  constexpr int kSpins = 100000;  // then the other one may need this core
  for (int turn = thread; turn < 2 * trips; turn += 2) {
    for (int spin = 0; ball->load() != turn; ++spin) {
      if (spin > kSpins) std::this_thread::yield();
    }
    ball->store(turn + 1);
  }
}

}  // namespace

double handover_ns() {
  constexpr int kTrips = 2000;
  constexpr int kRepeats = 10;  // the best one was disturbed least
  double best = std::numeric_limits<double>::infinity();
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::atomic<int> meeting{0}, ball{0};
    ThreadPool::instance().run(2, [&](int thread) {
      pass_back_and_forth(&meeting, thread, 1);
      const auto start = Clock::now();
      pass_back_and_forth(&ball, thread, kTrips);
      const std::chrono::duration<double, std::nano> elapsed = Clock::now() - start;
      if (thread == 1) best = std::min(best, elapsed.count() / kTrips);
    });
  }
  return best;
}

double fma_peak(int threads) {
  constexpr Index kRounds = 1000000;  // a few milliseconds
  constexpr int kRepeats = 40;        // the best one was disturbed least
  const Kernels<float>& table = kernels<float>();
  std::vector<double> flop(static_cast<std::size_t>(std::max(threads, 1)));
  double best = 0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const auto start = Clock::now();
    ThreadPool::instance().run(static_cast<int>(flop.size()), [&](int thread) {
      flop[static_cast<std::size_t>(thread)] = table.fma_rounds(kRounds);
    });
    const std::chrono::duration<double> seconds = Clock::now() - start;
    double total = 0;
    for (double one : flop) total += one;
    best = std::max(best, total / seconds.count() / 1e9);
  }
  return best;
}

}  // namespace fastmaml
