// How many threads are worth having where others want the cores too.
#pragma once

#include <algorithm>
#include <atomic>
#include <limits>
#include <mutex>

namespace fastmaml {

// A thread that the system does not let run keeps all others waiting, for milliseconds at each
// barrier. Where half as many threads would have been faster, later calls run on those, until they
// have taken several times what was lost; then one of them tries more. So what trying costs is a
// small part of the whole. Results do not depend on the number of threads.
class ThreadLimit {
 public:
  int allowed(int wanted) const { return std::min(wanted, allowed_.load()); }

  // A call that `wanted` so many threads took `seconds` on `used` ones, and would have taken
  // `alone` on one.
  void took(int wanted, int used, double seconds, double alone);

 private:
  static constexpr int kNone = std::numeric_limits<int>::max();
  static constexpr double kCredit = 0.05;      // seconds that may be lost, to hiccups
  static constexpr double kCreditOfCalls = 3;  // or so many calls, if that is longer
  static constexpr double kCreditOfTry = 1e-3;
  static constexpr double kLeastPatience = 8;  // times what was lost
  static constexpr double kMostPatience = 64;

  void halve(int used);
  void try_more();

  std::atomic<int> allowed_{kNone};
  std::mutex mutex_;
  int limit_ = kNone;  // known to be good; more than that is a try
  double patience_ = kLeastPatience;
  double calm_ = 0;  // seconds of calls before the next try
  double credit_ = kCredit;
  double left_ = kCredit;  // of the credit
};

// The threads of one call of the core, which is timed for the process's limit. With
// FASTMAML_FIXED_THREADS=1 in the environment always as many as are wanted.
class CallThreads {
 public:
  explicit CallThreads(int wanted);
  ~CallThreads();
  CallThreads(const CallThreads&) = delete;
  CallThreads& operator=(const CallThreads&) = delete;

  int count() const { return used_; }

 private:
  int wanted_;
  int used_;
  double started_;
  double waited_, spared_;  // by the calling thread, before
};

}  // namespace fastmaml
