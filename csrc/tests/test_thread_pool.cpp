// The thread pool and its teams: coverage, errors, concurrent callers, forks.
#include <sys/wait.h>
#include <unistd.h>

#include <stdexcept>
#include <thread>

#include "check.h"
#include "cpu/thread_pool.h"

namespace {

using namespace fastmaml_test;
using fastmaml::for_each_unit;
using fastmaml::TeamMember;
using fastmaml::ThreadPool;

void check_every_thread_runs_once() {
  for (int threads : {1, 2, 7, 3}) {
    std::vector<std::atomic<int>> calls(threads);
    ThreadPool::instance().run(threads, [&](int index) { ++calls[index]; });
    for (int i = 0; i < threads; ++i) {
      check(calls[i] == 1, "thread " + std::to_string(i) + " of " + std::to_string(threads));
    }
  }
}

void check_errors_reach_the_caller() {
  for (int culprit : {0, 3}) {
    try {
      ThreadPool::instance().run(4, [&](int index) {
        if (index == culprit) throw std::runtime_error("broken");
      });
      fail("an exception was lost");
    } catch (const std::runtime_error& error) {
      check(error.what() == std::string("broken"), "another exception arrived");
    }
  }
  check_every_thread_runs_once();
}

void check_units(Index units, int threads) {
  const std::string name =
      std::to_string(units) + " units, " + std::to_string(threads) + " threads";
  std::vector<std::atomic<int>> parts(units), seen(units);
  for_each_unit(units, threads, [&](const TeamMember& member, Index unit) {
    parts[unit] = member.share.parts;
    ++seen[unit];
    member.sync();
    check(seen[unit] == member.share.parts, name + ": the barrier let a thread through");
    member.sync();
  });
  int total = 0;
  for (Index unit = 0; unit < units; ++unit) {
    check(seen[unit] == parts[unit], name + ": unit " + std::to_string(unit));
    total += parts[unit];
  }
  check(total == std::max<Index>(units, threads), name + ": idle threads");
}

void check_failing_member_releases_its_team() {
  try {
    for_each_unit(1, 3, [](const TeamMember& member, Index) {
      if (member.share.part == 1) throw std::invalid_argument("bad member");
      member.sync();
      fail("a thread passed the barrier without its team");
    });
    fail("a failing member went unnoticed");
  } catch (const std::invalid_argument& error) {
    check(error.what() == std::string("bad member"), "another exception arrived");
  }
}

void check_concurrent_callers() {
  std::atomic<int> sum{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        ThreadPool::instance().run(3, [&](int index) { sum += index; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  check(sum == 4 * 50 * 3, "concurrent callers lost work");
}

void check_fork() {
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a child that waits for the parent's threads would wait forever
    std::atomic<int> sum{0};
    ThreadPool::instance().run(4, [&](int index) { sum += index; });
    _exit(sum == 6 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  check(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the pool does not work in a forked child");
  check_every_thread_runs_once();
}

}  // namespace

int main() {
  check_every_thread_runs_once();
  check_errors_reach_the_caller();
  for (Index units : {1, 2, 5, 16}) {
    for (int threads : {1, 2, 3, 7}) check_units(units, threads);
  }
  check_failing_member_releases_its_team();
  check_concurrent_callers();
  check_fork();
  return report("thread_pool");
}
