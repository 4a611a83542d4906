// Fewer threads where others want the cores: what the limit does about calls that waited, and that
// the pool and its barriers tell what they waited.
#include <chrono>
#include <cstdlib>
#include <thread>

#include "check.h"
#include "cpu/thread_limit.h"
#include "cpu/thread_pool.h"

namespace {

using namespace fastmaml_test;
using fastmaml::CallThreads;
using fastmaml::for_each_unit;
using fastmaml::team_seconds;
using fastmaml::TeamMember;
using fastmaml::TeamSeconds;
using fastmaml::ThreadLimit;
using fastmaml::ThreadPool;

constexpr double kWork = 1e-3;  // seconds of a call's own

void sleep_for(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

// One call on as many threads as are allowed; if on more than `free` of them, it waits.
int call(ThreadLimit& limit, int wanted, int free, double wait) {
  const int used = limit.allowed(wanted);
  const double waited = used > free ? wait : 0;
  limit.took(wanted, used, kWork + waited, used * kWork);
  return used;
}

void check_undisturbed_calls_keep_their_threads() {
  ThreadLimit limit;
  for (int i = 0; i < 100; ++i) {
    check(call(limit, 8, 8, 0) == 8, "a thread too few");
    limit.took(8, 8, 2 * kWork, 9 * kWork);  // the last of 9 tasks
    limit.took(8, 8, 1e-4, 0.1e-4);          // threads that slept
    limit.took(1, 1, 1.0, 1.0);
  }
  check(limit.allowed(8) == 8, "undisturbed calls lost their threads");
  limit.took(8, 8, 0.04 + kWork, 8 * kWork);
  check(limit.allowed(8) == 8, "a hiccup cost threads");
}

void check_slow_threads_are_better_than_none() {
  ThreadLimit limit;
  for (int i = 0; i < 100; ++i) {
    limit.took(2, 2, 0.15, 0.1);  // this thread had its core for itself, the other had not,
    limit.took(2, 2, 0.15, 0.3);  // or the other way round
  }
  check(limit.allowed(2) == 2, "of two threads, each of which is late at times, one was given up");
}

void check_late_threads_cost_little() {
  for (const int wanted : {2, 3, 64}) {
    ThreadLimit limit;
    double spent = 0, lost = 0;
    for (int i = 0; i < 40000; ++i) {
      const bool late = call(limit, wanted, 1, 0.02) > 1;
      spent += kWork;
      lost += late ? 0.02 : 0;
    }
    check(lost > 0.3, "no thread was tried again");
    check(lost < 0.05 * spent, "too much is lost to late threads: " + std::to_string(lost));
  }
}

void check_as_many_as_there_are() {
  ThreadLimit limit;
  int often = 0;
  for (int i = 0; i < 20000; ++i) often += call(limit, 64, 20, 0.02) == 16;
  check(often > 19000, "16 of 20 free threads were used " + std::to_string(often) + " times");
}

void check_threads_come_back() {
  ThreadLimit limit;
  int bad = 0;
  while (limit.allowed(64) == 64 && bad < 10) bad += call(limit, 64, 1, 0.02) == 64;
  check(bad == 3, "threads were given up after " + std::to_string(bad) + " bad calls");
  check(limit.allowed(64) == 32, "half of them are enough at first");
  int calls = 0;
  while (limit.allowed(64) < 64 && calls < 10000) {
    call(limit, 64, 64, 0);
    ++calls;
  }
  check(calls > 400 && calls < 600, "back after " + std::to_string(calls) + " calls");
  for (int i = 0; i < 1000; ++i) check(call(limit, 64, 64, 0) == 64, "and to stay");
}

void check_small_calls_do_not_count() {
  ThreadLimit limit;
  while (limit.allowed(4) == 4) call(limit, 4, 1, 0.02);
  for (int i = 0; i < 10000; ++i) limit.took(1, 1, kWork, kWork);
  check(limit.allowed(4) == 2, "calls that want no more threads brought them back");
}

struct Difference {
  TeamSeconds before = team_seconds();
  double waited() const { return team_seconds().waited - before.waited; }
  double spared() const { return team_seconds().spared - before.spared; }
};

void check_waits_are_told() {
  const Difference at_the_end;
  ThreadPool::instance().run(2, [](int index) {
    if (index == 1) sleep_for(0.2);
  });
  check(at_the_end.waited() > 0.1, "waited for the other to finish");
  const Difference at_barrier;
  for_each_unit(1, 2, [](const TeamMember& member, Index) {
    if (member.share.part == 1) sleep_for(0.2);
    member.sync();
  });
  check(at_barrier.waited() > 0.1, "waited at a barrier");
  check(at_barrier.spared() < 0.1, "waiting at a barrier was taken for work");
}

void check_work_of_others_is_told() {
  const Difference alike;
  ThreadPool::instance().run(2, [](int) { sleep_for(0.2); });
  check(alike.waited() < 0.1, "its own work was taken for waiting");
  check(alike.spared() > 0.1, "half of the work was the other's");
  const Difference interrupted;
  ThreadPool::instance().run(2, [](int index) {
    if (index == 0) sleep_for(0.2);
  });
  check(interrupted.waited() < 0.1, "its own work was taken for waiting");
  check(interrupted.spared() < 0.1, "the other did nothing for that long");
}

void check_units_of_others_are_counted() {
  const Difference difference;
  for_each_unit(5, 2,
                [](const TeamMember& member, Index) { sleep_for(member.team == 0 ? 0.1 : 1.0); });
  const double spared = difference.spared();  // one unit of five
  check(spared > 0.08 && spared < 0.4,
        "the other's unit at this thread's speed: " + std::to_string(spared));
  check(difference.waited() > 0.1, "waited for its unit");
}

void check_calls_of_the_process() {
  {
    const CallThreads on(2);
    check(on.count() == 2, "two threads at first");
    ThreadPool::instance().run(on.count(), [](int index) {
      if (index == 1) sleep_for(0.2);
    });
  }
  const int expected = std::getenv("FASTMAML_FIXED_THREADS") == nullptr ? 1 : 2;
  check(CallThreads(2).count() == expected, "threads after one was late");
}

}  // namespace

int main() {
  check_undisturbed_calls_keep_their_threads();
  check_slow_threads_are_better_than_none();
  check_late_threads_cost_little();
  check_as_many_as_there_are();
  check_threads_come_back();
  check_small_calls_do_not_count();
  check_waits_are_told();
  check_work_of_others_is_told();
  check_units_of_others_are_counted();
  check_calls_of_the_process();
  return report("thread_limit");
}
