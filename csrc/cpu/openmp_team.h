// The threads of an OpenMP runtime that the process has loaded anyway (PyTorch's).
#pragma once

#include <functional>

namespace fastmaml {

// Runs body(0) ... body(threads - 1) at once on them. False, and nothing was run, where there is no
// such runtime or it does not give that many threads (inside a parallel region, in a forked child,
// under a thread limit). `body` must not throw. One call at a time.
bool run_on_openmp(int threads, const std::function<void(int)>& body);

}  // namespace fastmaml
