// Two pools of threads in one process fight for the cores: an OpenMP worker spins for milliseconds
// after PyTorch's last parallel loop, where our own worker wants to run. So the core takes its
// threads from the runtime that is there, found by name, without being built against one.
#include "cpu/openmp_team.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

namespace fastmaml {

namespace {

// The calls that compilers emit for `#pragma omp parallel`; GNU's and LLVM's runtimes have them.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread)();
  int (*team_size)();

  explicit operator bool() const {
    return parallel != nullptr && thread != nullptr && team_size != nullptr;
  }
};

// The runtime's workers do not exist in a forked child, and it would wait for them forever.
std::atomic<bool> forked{false};

template <typename Function>
Function loaded(const char* name) {
  return reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

OpenMp find_runtime() {
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
  return {loaded<decltype(OpenMp::parallel)>("GOMP_parallel"),
          loaded<decltype(OpenMp::thread)>("omp_get_thread_num"),
          loaded<decltype(OpenMp::team_size)>("omp_get_num_threads")};
}

struct Call {
  const OpenMp& runtime;
  int threads;
  const std::function<void(int)>& body;
  std::atomic<bool> complete{false};

  static void enter(void* data) {
    Call& call = *static_cast<Call*>(data);
    // Members of a team wait for each other: with fewer threads than asked for, none may start.
    if (call.runtime.team_size() != call.threads) return;
    call.complete.store(true, std::memory_order_relaxed);
    call.body(call.runtime.thread());
  }
};

}  // namespace

bool run_on_openmp(int threads, const std::function<void(int)>& body) {
  static const OpenMp runtime = find_runtime();
  if (!runtime || forked.load()) return false;
  Call call{runtime, threads, body};
  runtime.parallel(&Call::enter, &call, static_cast<unsigned>(threads), 0);
  return call.complete.load();
}

}  // namespace fastmaml
