// The fused update and its adjoint, compiled for the host, against plain loops.
#include <stdexcept>

#include "check.h"
#include "fastmaml/device.h"

namespace {

using namespace fastmaml_test;
using fastmaml::DType;
using fastmaml::RateTerm;
using fastmaml::Stream;

enum class Rates { kNone, kOne, kEach };

template <typename T>
struct Problem {
  Index tasks, size;
  bool shared_theta;
  Rates kind;
  std::vector<T> theta, gradient, cotangent, rates;

  Problem(Index tasks, Index size, bool shared_theta, Rates kind)
      : tasks(tasks),
        size(size),
        shared_theta(shared_theta),
        kind(kind),
        theta(random_values<T>(shared_theta ? size : tasks * size)),
        gradient(random_values<T>(tasks * size)),
        cotangent(random_values<T>(tasks * size)),
        rates(random_values<T>(kind == Rates::kEach ? size : 1)) {}

  DType dtype() const { return sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64; }
  RateTerm term() const {
    return {0.3, kind == Rates::kNone ? nullptr : rates.data(), kind == Rates::kEach};
  }
  double rate(Index i) const {
    if (kind == Rates::kNone) return 0.3;
    return 0.3 * static_cast<double>(rates[kind == Rates::kEach ? i : 0]);
  }
};

template <typename T>
void check_update(const Problem<T>& p, int threads, const std::string& name) {
  std::vector<double> moved, dgradient, drates(p.size, 0.0);
  for (Index task = 0; task < p.tasks; ++task) {
    for (Index i = 0; i < p.size; ++i) {
      const Index at = task * p.size + i;
      moved.push_back(p.theta[p.shared_theta ? i : at] - p.rate(i) * p.gradient[at]);
      dgradient.push_back(-p.rate(i) * p.cotangent[at]);
      drates[i] -= 0.3 * static_cast<double>(p.cotangent[at]) * static_cast<double>(p.gradient[at]);
    }
  }
  const Index all = p.tasks * p.size;
  auto got_moved = poisoned<T>(all), got_dgradient = poisoned<T>(all);
  auto got_drates = poisoned<T>(p.size);
  const Stream stream{0, 0, threads};
  const auto& kernels = *fastmaml::emulated_kernels();
  kernels.update({p.dtype(), p.theta.data(), p.shared_theta ? 0 : p.size, p.gradient.data(),
                  p.term(), got_moved.data(), p.tasks, p.size},
                 stream);
  kernels.update_adjoint({p.dtype(), p.cotangent.data(), p.gradient.data(), p.term(),
                          got_dgradient.data(), got_drates.data(), p.tasks, p.size},
                         stream);
  check_close(got_moved, moved, 2, name + " update", 1);
  check_close(got_dgradient, dgradient, 2, name + " adjoint, gradient");
  check_close(got_drates, drates, 8, name + " adjoint, rates", 1);

  std::vector<T> alone = poisoned<T>(p.size), also_alone = poisoned<T>(all);
  kernels.update_adjoint({p.dtype(), p.cotangent.data(), p.gradient.data(), p.term(), nullptr,
                          alone.data(), p.tasks, p.size},
                         Stream());
  kernels.update_adjoint({p.dtype(), p.cotangent.data(), nullptr, p.term(), also_alone.data(),
                          nullptr, p.tasks, p.size},
                         Stream());
  check(alone == got_drates, name + ": the rates' gradient depends on what else is wanted");
  check(also_alone == got_dgradient, name + ": the gradient's depends on what else is wanted");
}

template <typename T>
void check_type() {
  for (const Rates kind : {Rates::kNone, Rates::kOne, Rates::kEach}) {
    for (const auto& [tasks, size] : {std::pair<Index, Index>{1, 1}, {3, 33}, {25, 1761}, {9, 5}}) {
      for (const bool shared_theta : {false, true}) {
        const Problem<T> problem(tasks, size, shared_theta, kind);
        for (const int threads : {1, 7}) {
          check_update(problem, threads,
                       std::string(scalar_name<T>()) + " rates " +
                           std::to_string(static_cast<int>(kind)) + ", " + std::to_string(tasks) +
                           " x " + std::to_string(size) + ", " + std::to_string(threads) +
                           " threads");
        }
      }
    }
  }
}

template <typename Call>
void check_refused(const std::string& expected, Call call) {
  try {
    call();
    fail("accepted: " + expected);
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).find(expected) != std::string::npos,
          "refused with another reason than " + expected + ": " + error.what());
  }
}

void check_errors() {
  const auto& kernels = *fastmaml::emulated_kernels();
  float x = 1;
  const DType dtype = DType::kFloat32;
  check_refused("update: theta, gradient",
                [&] { kernels.update({dtype, nullptr, 1, &x, {}, &x, 1, 1}, Stream()); });
  check_refused("update: theta_stride",
                [&] { kernels.update({dtype, &x, 1, &x, {}, &x, 1, 2}, Stream()); });
  check_refused("update_adjoint: gradient", [&] {
    kernels.update_adjoint({dtype, &x, nullptr, {}, nullptr, &x, 1, 1}, Stream());
  });
  check_refused("update_adjoint: tasks",
                [&] { kernels.update_adjoint({dtype, &x, &x, {}, nullptr, &x, 0, 1}, Stream()); });
}

}  // namespace

int main() {
  check_type<float>();
  check_type<double>();
  check_errors();
  return report("cuda_update");
}
