#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <numeric>
#include <utility>

#include "cpu/openmp_team.h"

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace fastmaml {

namespace {

constexpr int kIdleSpins = 4000;
constexpr int kBarrierSpins = 2000;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // as long as x86's pause; `yield` is no wait at all on most processors
#else
  std::this_thread::yield();
#endif
}

std::atomic<ThreadPool*> current_pool{nullptr};
std::mutex* creation_mutex = new std::mutex;

// The parent's workers do not exist in the child, and its locks may be held by threads that do not
// exist either: both are left behind.
void forget_pool_after_fork() {
  current_pool.store(nullptr);
  creation_mutex = new std::mutex;
}

}  // namespace

double seconds_now() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double>(now).count();
}

TeamSeconds& team_seconds() {
  thread_local TeamSeconds seconds;
  return seconds;
}

struct ThreadPool::Worker {
  std::thread thread;
  std::atomic<bool> called{false};
  std::atomic<bool> asleep{false};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;

  void notify() {
    if (!asleep.load()) return;
    std::lock_guard<std::mutex> lock(mutex);
    wake.notify_one();
  }

  bool has_news() const { return called.load() || stop.load(); }

  void wait() {
    for (int spin = 0; spin < kIdleSpins; ++spin) {
      if (has_news()) return;
      pause();
    }
    std::unique_lock<std::mutex> lock(mutex);
    asleep.store(true);
    wake.wait(lock, [this] { return has_news(); });
    asleep.store(false);
  }
};

ThreadPool& ThreadPool::instance() {
  ThreadPool* pool = current_pool.load();
  if (pool != nullptr) return *pool;
  std::lock_guard<std::mutex> lock(*creation_mutex);
  static const int registered = pthread_atfork(nullptr, nullptr, forget_pool_after_fork);
  (void)registered;
  if (current_pool.load() == nullptr) current_pool.store(new ThreadPool);
  return *current_pool.load();
}

ThreadPool::~ThreadPool() {
  for (auto& worker : workers_) {
    worker->stop.store(true);
    worker->notify();
  }
  for (auto& worker : workers_) worker->thread.join();
}

void ThreadPool::run(int threads, const std::function<void(int)>& body) {
  if (threads <= 1) return body(0);
  const Worked worked = call_all(threads, body);
  team_seconds().spared += std::min(worked.caller * (threads - 1), worked.others);
}

void ThreadPool::run_units(int threads, Index units, const std::function<void(int, Index)>& body) {
  std::atomic<Index> next{0};
  Index own = 0;
  const auto take_units = [&](int thread) {
    for (Index unit = next++; unit < units; unit = next++) {
      body(thread, unit);
      if (thread == 0) ++own;
    }
  };
  if (threads <= 1) return take_units(0);
  const Worked worked = call_all(threads, take_units);
  const double at_own_speed = own > 0 ? worked.caller * (units - own) / own : worked.others;
  team_seconds().spared += std::min(at_own_speed, worked.others);
}

ThreadPool::Worked ThreadPool::call_all(int threads, const std::function<void(int)>& body) {
  std::lock_guard<std::mutex> lock(run_mutex_);
  const double started = seconds_now(), waited_before = team_seconds().waited;
  body_ = &body;
  worked_.assign(threads, 0.0);
  if (!run_on_openmp(threads, [this](int index) { call(index); })) run_on_workers(threads);
  body_ = nullptr;
  team_seconds().waited = waited_before + seconds_now() - started - worked_[0];
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  return {worked_[0], std::accumulate(worked_.begin() + 1, worked_.end(), 0.0)};
}

void ThreadPool::run_on_workers(int threads) {
  start_workers(threads - 1);
  pending_.store(threads - 1);
  for (int i = 0; i < threads - 1; ++i) {
    workers_[i]->called.store(true);
    workers_[i]->notify();
  }
  call(0);
  wait_for_workers();
}

void ThreadPool::start_workers(int count) {
  while (static_cast<int>(workers_.size()) < count) {
    workers_.push_back(std::make_unique<Worker>());
    Worker& worker = *workers_.back();
    const int index = static_cast<int>(workers_.size());
    try {
      worker.thread = std::thread([this, &worker, index] { work(worker, index); });
    } catch (...) {
      workers_.pop_back();
      throw;
    }
  }
}

void ThreadPool::work(Worker& worker, int index) {
  for (;;) {
    worker.wait();
    if (worker.stop.load()) return;
    worker.called.store(false);
    call(index);
    finish_one();
  }
}

void ThreadPool::call(int index) {
  const double started = seconds_now(), waited_before = team_seconds().waited;
  try {
    (*body_)(index);
  } catch (const TeamAborted&) {
    // The member that failed reports why.
  } catch (...) {
    std::lock_guard<std::mutex> lock(error_mutex_);
    if (!error_) error_ = std::current_exception();
  }
  worked_[index] = seconds_now() - started - (team_seconds().waited - waited_before);
}

void ThreadPool::finish_one() {
  if (pending_.fetch_sub(1) != 1) return;
  std::lock_guard<std::mutex> lock(done_mutex_);
  done_.notify_one();
}

void ThreadPool::wait_for_workers() {
  for (int spin = 0; spin < kIdleSpins; ++spin) {
    if (pending_.load() == 0) return;
    pause();
  }
  std::unique_lock<std::mutex> lock(done_mutex_);
  done_.wait(lock, [this] { return pending_.load() == 0; });
}

bool Barrier::passed(unsigned phase) const {
  if (phase_.load() != phase) return true;
  if (aborted_.load()) throw TeamAborted();
  return false;
}

void Barrier::wait() {
  const unsigned phase = phase_.load();
  if (arrived_.fetch_add(1) + 1 == parties_) {
    arrived_.store(0);
    phase_.fetch_add(1);
    return;
  }
  for (int spin = 0; spin < kBarrierSpins; ++spin) {
    if (passed(phase)) return;
    pause();
  }
  const double late = seconds_now();
  while (!passed(phase)) std::this_thread::yield();
  team_seconds().waited += seconds_now() - late;
}

int team_count(Index units, int threads) {
  return static_cast<int>(std::max<Index>(1, std::min<Index>(units, threads)));
}

void for_each_unit(Index units, int threads,
                   const std::function<void(const TeamMember&, Index)>& body) {
  if (units <= 0) return;
  const int teams = team_count(units, threads);
  if (threads <= teams) {
    ThreadPool::instance().run_units(teams, units, [&](int thread, Index unit) {
      body(TeamMember{thread, Share{}, nullptr}, unit);
    });
    return;
  }
  std::vector<std::unique_ptr<Barrier>> barriers;
  const auto first_of = [&](int team) { return (team * threads + teams - 1) / teams; };
  for (int team = 0; team < teams; ++team) {
    barriers.push_back(std::make_unique<Barrier>(first_of(team + 1) - first_of(team)));
  }
  ThreadPool::instance().run(threads, [&](int index) {
    const int team = index * teams / threads;
    Barrier& barrier = *barriers[team];
    const Share share{index - first_of(team), first_of(team + 1) - first_of(team)};
    try {
      body(TeamMember{team, share, &barrier}, team);
    } catch (...) {
      barrier.abort();
      throw;
    }
  });
}

}  // namespace fastmaml
