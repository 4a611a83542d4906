// Weights of wide layers that a meta-step leaves where they are. What inner steps add to such a
// weight, and the adjoint of it, are products of few rows: the gradient of y = x w is x^T gy, of as
// many rows as a task has examples (Goodfellow 2015, arXiv:1510.01799). So the weight, which tasks
// share, is never written out for a task; the rows are kept instead. All products with them are
// worked out as sums over rows, so that the gradients are the same.
#pragma once

#include <memory>
#include <vector>

#include "cpu/program.h"

namespace fastmaml {

// y += x w, and gx += gy w^T, where w [in][out] are factors.
template <typename T>
void add_product(Run<T>& run, const ProductShape& shape, const Factors<T>& w, const T* x, T* y);
template <typename T>
void add_transposed_product(Run<T>& run, const ProductShape& shape, const Factors<T>& w,
                            const T* gy, T* gx);

// Those of a meta-step's weights, and their rows: by team of the steps that its task has taken, by
// task of the adjoint.
template <typename T>
class FactoredWeights {
 public:
  // One thread's view of a task on its way.
  struct View {
    InFactors<T> in_factors;
    std::vector<Index> adjoint_rows;  // by weight
  };

  FactoredWeights(const Plan<T>& plan, ArenaPool& memory, const MetaStepArgs& args, int teams);

  bool empty() const { return weights_.empty(); }
  // The other weights, in packed theta.
  const std::vector<Range>& others() const { return others_; }
  const std::vector<Index>& offsets() const { return offsets_; }  // of the weights themselves
  Index transposed_size() const { return transposed_size_; }      // of the weights themselves

  View view(const Weights<T>& shared) const;
  // Before step k of a task, or (k = steps) its query.
  void bind(View& view, int team, Index task, Index k) const;
  // What a flow has noted, times `scale`, is added to the weight at step k, or to the adjoint; the
  // team meets before it is read.
  void add_step(Run<T>& run, Index k, T scale) const;
  void add_adjoint(Run<T>& run, const Flow<T>& flow, View& view, Index task, T scale) const;
  // No more is added to a task's adjoint.
  void finish(Run<T>& run, const View& view, Index task) const;
  // Writes the sum of all tasks' adjoints into a packed theta.
  void store(T* theta, int threads) const;

 private:
  struct Rows {
    std::shared_ptr<T> left, right;
  };
  struct Weight {
    int slot = 0;
    ProductShape shape;
    Index offset = 0;
    Index step_rows = 0, query_rows = 0, task_rows = 0;  // task_rows: of the whole adjoint
    std::vector<Rows> moved;                             // by team
    Rows adjoint;
  };

  Index left_ld(const Weight& w) const { return padded(w.shape.in, plan_.kernels->lanes); }
  Index right_ld(const Weight& w) const { return padded(w.shape.out, plan_.kernels->lanes); }
  Weight weight_of(const Op<T>& op) const;
  bool pays(const Weight& w) const;
  Rows take(ArenaPool& memory, const Weight& weight, Index rows) const;
  void append(Run<T>& run, const Weight& weight, const Rows& to, Index at, const T* x, const T* gy,
              T scale) const;
  void clear(const Weight& weight, const Rows& rows, Index begin, Index end) const;
  Factors<T> part(const Weight& weight, const Rows& rows, Index first, Index count) const;
  void find_others();

  const Plan<T>& plan_;
  const MetaStepArgs& args_;
  std::vector<Weight> weights_;
  std::vector<Range> others_;
  std::vector<Index> offsets_;
  Index transposed_size_ = 0;
};

}  // namespace fastmaml
