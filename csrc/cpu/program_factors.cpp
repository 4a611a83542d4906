#include "cpu/program_factors.h"

#include <algorithm>

namespace fastmaml {

namespace {

// Of a weight's own copies, transposes and updates in an inner step and its adjoint: as many
// multiplications as they cost for each element, where the weight outgrows the core's cache.
constexpr Index kPassesOfAStep = 10;
constexpr Index kCostOfAPass = 6;
constexpr Index kCachedElements = 80'000;
constexpr double kSafeShare = 0.6;  // of what is saved, at most, for products with factors
constexpr Index kMostRowBytes = Index{256} << 20;  // of all tasks' adjoints

// a [rows][depth] times inner^T [depth][count], times outer [count][columns], added to `out`.
template <typename T>
void add_through(Run<T>& run, Index rows, Index depth, const T* a, Index lda, const T* inner,
                 Index count, const T* outer, Index columns, T* out) {
  const Index ld = padded(count, run.kernels.lanes);
  std::vector<T>& products = run.factors->products;
  products.resize(static_cast<std::size_t>(std::max<Index>(products.size(), rows * ld)));
  run.kernels.matmul_nt(rows, depth, count, a, lda, inner, padded(depth, run.kernels.lanes),
                        products.data(), Share{});
  run.kernels.matmul(rows, count, columns, products.data(), ld, outer, nullptr, 0, nullptr, nullptr,
                     out, true, run.share);
}

template <typename T>
int uses_of(const Plan<T>& plan, int slot) {
  int uses = 0;
  for (const auto& op : plan.ops) {
    uses += static_cast<int>(std::count(op->slots.begin(), op->slots.end(), slot));
  }
  return uses;
}

}  // namespace

template <typename T>
void add_product(Run<T>& run, const ProductShape& shape, const Factors<T>& w, const T* x, T* y) {
  if (w.rows == 0) return;
  add_through(run, run.examples() * shape.positions, shape.in, x, shape.lda, w.left, w.rows,
              w.right, shape.out, y);
}

template <typename T>
void add_transposed_product(Run<T>& run, const ProductShape& shape, const Factors<T>& w,
                            const T* gy, T* gx) {
  if (w.rows == 0) return;
  add_through(run, run.examples() * shape.positions, shape.out, gy,
              padded(shape.out, run.kernels.lanes), w.right, w.rows, w.left, shape.in, gx);
}

template <typename T>
FactoredWeights<T>::FactoredWeights(const Plan<T>& plan, ArenaPool& memory,
                                    const MetaStepArgs& args, int teams)
    : plan_(plan), args_(args) {
  // Where nothing but these rows is asked for.
  const bool plain = args.rates == nullptr && args.update == nullptr && args.theta_stride == 0;
  const bool wanted = args.gtheta != nullptr && args.query_examples > 0 && args.adapted == nullptr;
  if (plain && wanted && args.steps > 0) {
    for (const auto& op : plan.ops) {
      Weight weight = weight_of(*op);
      if (!pays(weight)) continue;
      for (int team = 0; team < teams; ++team) {
        weight.moved.push_back(take(memory, weight, args.steps * weight.step_rows));
      }
      weight.adjoint = take(memory, weight, args.tasks * weight.task_rows);
      weights_.push_back(std::move(weight));
    }
  }
  find_others();
}

// Without rows, where the op has no weight that could be kept in factors.
template <typename T>
typename FactoredWeights<T>::Weight FactoredWeights<T>::weight_of(const Op<T>& op) const {
  Weight weight;
  weight.shape = op.product_shape();
  if (weight.shape.positions == 0) return weight;
  weight.slot = op.slots[0];
  const PackedSlot& slot = plan_.slots[weight.slot];
  if (!slot.adapted || uses_of(plan_, weight.slot) != 1) return weight;
  weight.offset = slot.packed;
  weight.step_rows = args_.support_examples * weight.shape.positions;
  weight.query_rows = args_.query_examples * weight.shape.positions;
  weight.task_rows = weight.query_rows;
  if (args_.first_order) return weight;
  const bool input_moves = (plan_.storages[op.inputs[0]].depends & kTheta) != 0;
  weight.task_rows += args_.steps * weight.step_rows * (input_moves ? 2 : 1);
  return weight;
}

// Whether products with factors are less than the passes over the weight that they save.
template <typename T>
bool FactoredWeights<T>::pays(const Weight& w) const {
  const Index bytes = args_.tasks * w.task_rows * (left_ld(w) + right_ld(w)) * Index{sizeof(T)};
  if (w.step_rows == 0 || bytes > kMostRowBytes) return false;
  const Index moved = w.step_rows * args_.steps, size = w.shape.in * w.shape.out;
  const Index saved = size * (3 * moved + kPassesOfAStep * kCostOfAPass * args_.steps);
  const Index spent = 2 * (w.shape.in + w.shape.out) * moved * (w.query_rows + moved + w.task_rows);
  const double outgrown = static_cast<double>(std::min(size, kCachedElements)) / kCachedElements;
  return static_cast<double>(spent) < kSafeShare * outgrown * static_cast<double>(saved);
}

template <typename T>
void FactoredWeights<T>::find_others() {
  std::sort(weights_.begin(), weights_.end(),
            [](const Weight& a, const Weight& b) { return a.offset < b.offset; });
  Index end = 0;
  for (const Weight& weight : weights_) {
    const PackedSlot& slot = plan_.slots[weight.slot];
    offsets_.push_back(weight.offset);
    transposed_size_ += slot.transposed < 0 ? 0 : slot.out * padded(slot.in, plan_.kernels->lanes);
    if (weight.offset > end) others_.push_back({end, weight.offset});
    end = weight.offset + slot.packed_size;
  }
  if (end < plan_.theta.packed_size()) others_.push_back({end, plan_.theta.packed_size()});
}

template <typename T>
typename FactoredWeights<T>::Rows FactoredWeights<T>::take(ArenaPool& memory, const Weight& weight,
                                                           Index rows) const {
  return {memory.take<T>(rows * left_ld(weight)), memory.take<T>(rows * right_ld(weight))};
}

template <typename T>
Factors<T> FactoredWeights<T>::part(const Weight& weight, const Rows& rows, Index first,
                                    Index count) const {
  return {rows.left.get() + first * left_ld(weight), rows.right.get() + first * right_ld(weight),
          count};
}

template <typename T>
typename FactoredWeights<T>::View FactoredWeights<T>::view(const Weights<T>& shared) const {
  View view;
  if (empty()) return view;
  view.in_factors.shared = shared;
  view.in_factors.has.resize(plan_.slots.size());
  view.in_factors.moved.resize(plan_.slots.size());
  view.in_factors.directions.resize(plan_.slots.size());
  for (const Weight& weight : weights_) view.in_factors.has[weight.slot] = 1;
  view.adjoint_rows.resize(weights_.size());
  return view;
}

template <typename T>
void FactoredWeights<T>::bind(View& view, int team, Index task, Index k) const {
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    const Weight& weight = weights_[i];
    view.in_factors.moved[weight.slot] = part(weight, weight.moved[team], 0, k * weight.step_rows);
    view.in_factors.directions[weight.slot] =
        part(weight, weight.adjoint, task * weight.task_rows, view.adjoint_rows[i]);
  }
}

// Whatever pads the rows of x must not get into sums.
template <typename T>
void FactoredWeights<T>::append(Run<T>& run, const Weight& weight, const Rows& to, Index at,
                                const T* x, const T* gy, T scale) const {
  const Index in = weight.shape.in, left = left_ld(weight), right = right_ld(weight);
  const Range mine = split(run.examples() * weight.shape.positions, run.share);
  for (Index row = mine.begin; row < mine.end; ++row) {
    T* a = to.left.get() + (at + row) * left;
    std::copy(x + row * weight.shape.lda, x + row * weight.shape.lda + in, a);
    std::fill(a + in, a + left, T(0));
    T* b = to.right.get() + (at + row) * right;
    for (Index i = 0; i < right; ++i) b[i] = scale * gy[row * right + i];
  }
}

template <typename T>
void FactoredWeights<T>::add_step(Run<T>& run, Index k, T scale) const {
  for (const Weight& weight : weights_) {
    const Rows& rows = weight.moved[run.member.team];
    const Index at = k * weight.step_rows;
    const Pairs<T>& noted = run.first.noted[weight.slot];
    if (noted) {
      append(run, weight, rows, at, noted.a[0], noted.b[0], scale);
    } else if (run.share.part == 0) {
      clear(weight, rows, at, at + weight.step_rows);
    }
  }
}

template <typename T>
void FactoredWeights<T>::clear(const Weight& weight, const Rows& rows, Index begin,
                               Index end) const {
  std::fill(rows.left.get() + begin * left_ld(weight), rows.left.get() + end * left_ld(weight),
            T(0));
  std::fill(rows.right.get() + begin * right_ld(weight), rows.right.get() + end * right_ld(weight),
            T(0));
}

template <typename T>
void FactoredWeights<T>::add_adjoint(Run<T>& run, const Flow<T>& flow, View& view, Index task,
                                     T scale) const {
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    const Weight& weight = weights_[i];
    const Pairs<T>& noted = flow.noted[weight.slot];
    for (int pair = 0; pair < noted.count; ++pair) {
      append(run, weight, weight.adjoint, task * weight.task_rows + view.adjoint_rows[i],
             noted.a[pair], noted.b[pair], scale);
      view.adjoint_rows[i] += run.examples() * weight.shape.positions;
    }
  }
  run.sync();
}

template <typename T>
void FactoredWeights<T>::finish(Run<T>& run, const View& view, Index task) const {
  if (run.share.part != 0) return;
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    const Weight& weight = weights_[i];
    clear(weight, weight.adjoint, task * weight.task_rows + view.adjoint_rows[i],
          (task + 1) * weight.task_rows);
  }
}

template <typename T>
void FactoredWeights<T>::store(T* theta, int threads) const {
  ThreadPool::instance().run(threads, [&](int part) {
    for (const Weight& weight : weights_) {
      plan_.kernels->matmul_tn(args_.tasks * weight.task_rows, weight.shape.in, weight.shape.out,
                               weight.adjoint.left.get(), left_ld(weight),
                               weight.adjoint.right.get(), nullptr, 0, nullptr,
                               theta + weight.offset, false, Share{part, threads});
    }
  });
}

#define FASTMAML_INSTANTIATE(T)                                                                \
  template void add_product<T>(Run<T>&, const ProductShape&, const Factors<T>&, const T*, T*); \
  template void add_transposed_product<T>(Run<T>&, const ProductShape&, const Factors<T>&,     \
                                          const T*, T*);                                       \
  template class FactoredWeights<T>;
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)
#undef FASTMAML_INSTANTIATE

}  // namespace fastmaml
