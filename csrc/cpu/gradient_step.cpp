// The inner gradient step outside a program.
#include <algorithm>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "fastmaml/core.h"

namespace fastmaml {

namespace {

constexpr Index kBlock = 2048;  // elements of a row that stay in L1 between two kernels

template <typename T>
void adjoint(const StepAdjointArgs& args, T* dgradient, T* sum) {
  const Kernels<T>& table = kernels<T>();
  const auto* cotangent = static_cast<const T*>(args.cotangent);
  const T scale = static_cast<T>(-args.rate);
  const Index blocks = (args.size + kBlock - 1) / kBlock;
  ThreadPool::instance().run(args.threads, [&](int part) {
    const Range mine = split(blocks, Share{part, args.threads});
    for (Index block = mine.begin; block < mine.end; ++block) {
      const Index begin = block * kBlock, count = std::min(kBlock, args.size - begin);
      for (Index task = 0; task < args.tasks; ++task) {
        const T* from = cotangent + task * args.size + begin;
        if (dgradient != nullptr) {
          table.axpby(count, scale, from, T(0), nullptr, dgradient + task * args.size + begin,
                      false, Share{});
        }
        table.axpby(count, T(1), from, T(0), nullptr, sum + begin, task > 0, Share{});
      }
    }
  });
}

}  // namespace

void step_adjoint(const StepAdjointArgs& args) {
  if (args.dtype == DType::kFloat64) {
    adjoint(args, static_cast<double*>(args.dgradient), static_cast<double*>(args.sum));
  } else {
    adjoint(args, static_cast<float*>(args.dgradient), static_cast<float*>(args.sum));
  }
}

}  // namespace fastmaml
