// The inner update rule within a meta-step: its coefficients, packed, the moments of a task on its
// way through the inner loop, and the sums of what the adjoint finds.
#pragma once

#include <vector>

#include "cpu/program.h"

namespace fastmaml {

template <typename T>
class InnerUpdates {
 public:
  // What a team keeps of its task.
  struct Workspace {
    std::vector<std::shared_ptr<T>> m, v;  // after each step but the last
    std::shared_ptr<T> adjoint_m, adjoint_v, blocks;
    std::vector<T> norms;  // of the gradients, where they are clipped by that
  };

  InnerUpdates(const Plan<T>& plan, ArenaPool& memory, const MetaStepArgs& args, Index groups);

  Workspace workspace(ArenaPool& memory) const;
  bool wants_gradient() const { return wants_gradient_; }

  // theta_{k+1}, and the moments beside it; the caller lets the team meet afterwards.
  void step(Run<T>& run, Workspace& work, Index k, const T* theta, const T* gradient, T* out) const;
  // Turns lambda_{k+1} into its part of lambda_k that does not pass the gradient, and writes the
  // cotangent on the gradient, whose Hessian product is the other part. The team meets at the end.
  void adjoint(Run<T>& run, Workspace& work, Index k, Index group, const T* theta,
               const T* gradient, T* lambda, T* direction) const;
  // The coefficients' gradients, means over tasks.
  void store_gradients(int threads) const;

 private:
  struct Coefficient {
    std::shared_ptr<T> packed;  // where there is one for each element
    const T* values = nullptr;  // [rows][width]
    Index rows = 1, width = 1;
    void* gradient = nullptr;
    Index first_scalar = 0;  // of its sums among those of all scalar coefficients
    GroupSums<T> sums;       // where there is one for each element
  };

  InnerStep<T> at(const Workspace& work, Index k, const T* theta, const T* gradient) const;
  T clip_factor(T norm) const;
  T total(const T* blocks) const;
  Index row(const Coefficient& c, Index k) const { return c.rows == 1 ? 0 : k; }

  const Plan<T>& plan_;
  const Kernels<T>& kernels_;
  const InnerUpdateArgs& rule_;
  const Index steps_, tasks_, size_, blocks_;
  bool wants_gradient_ = false;
  std::vector<Coefficient> coefficients_;
  Index scalars_ = 0;
  GroupSums<T> scalar_sums_;
};

}  // namespace fastmaml
