// The threads of the core, and teams that share one task.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

namespace fastmaml {

// Uses the process's OpenMP threads where there are some (see openmp_team.h), its own otherwise;
// these spin for a moment when idle, since meta-steps follow each other closely, then sleep.
class ThreadPool {
 public:
  // The process's pool. A forked child, which inherits no threads, gets a fresh one.
  static ThreadPool& instance();

  ~ThreadPool();

  // Runs body(0) here and body(1) ... body(threads - 1) on other threads, and waits for them all.
  // The first exception thrown by any of them is rethrown here. Concurrent calls take turns.
  void run(int threads, const std::function<void(int)>& body);

  // Calls body(thread, unit) for every unit; each of `threads` takes the next when it is done.
  void run_units(int threads, Index units, const std::function<void(int, Index)>& body);

 private:
  struct Worker;
  struct Worked {
    double caller, others;  // seconds
  };

  Worked call_all(int threads, const std::function<void(int)>& body);

  void run_on_workers(int threads);
  void start_workers(int count);
  void work(Worker& worker, int index);
  void call(int index);
  void finish_one();
  void wait_for_workers();

  std::mutex run_mutex_;
  std::vector<double> worked_;  // seconds of each thread, its waits at barriers left out
  std::vector<std::unique_ptr<Worker>> workers_;
  const std::function<void(int)>* body_ = nullptr;

  std::atomic<int> pending_{0};
  std::mutex done_mutex_;
  std::condition_variable done_;

  std::mutex error_mutex_;
  std::exception_ptr error_;
};

double seconds_now();

// The calling thread's seconds in all its calls: waiting for others, and what their work would
// have taken it, by the speed of its own or by theirs: the system may have kept either from
// running.
struct TeamSeconds {
  double waited = 0;
  double spared = 0;
};
TeamSeconds& team_seconds();

// Thrown out of Barrier::wait when another member of the team has failed.
struct TeamAborted : std::runtime_error {
  TeamAborted() : std::runtime_error("another thread of the team failed") {}
};

// Where the threads of one team meet between two ops.
class Barrier {
 public:
  explicit Barrier(int parties) : parties_(parties) {}
  void wait();
  void abort() { aborted_.store(true); }

 private:
  bool passed(unsigned phase) const;

  const int parties_;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> phase_{0};
  std::atomic<bool> aborted_{false};
};

// A thread's place: `team` of `share.parts` threads, meeting at `barrier`.
struct TeamMember {
  int team = 0;
  Share share;
  Barrier* barrier = nullptr;

  void sync() const {
    if (share.parts > 1) barrier->wait();
  }
};

// How many teams work at once on `units` independent pieces.
int team_count(Index units, int threads);

// Calls body(member, unit) for every unit. With at least as many units as threads every thread is a
// team of its own and takes the next unit when it is done; with fewer, each unit has a whole team.
void for_each_unit(Index units, int threads,
                   const std::function<void(const TeamMember&, Index)>& body);

// The part [begin, end) of `count` that falls to a share.
struct Range {
  Index begin, end;
};
inline Range split(Index count, Share share) {
  if (share.parts == 1) return {0, count};  // the common case is worth two divisions
  return {count * share.part / share.parts, count * (share.part + 1) / share.parts};
}

}  // namespace fastmaml
