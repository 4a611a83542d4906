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

// Whether the products with factors are less than what they save.
bool pays(const ProductShape& shape, Index step_rows, Index query_rows, Index task_rows,
          Index steps) {
  const Index moved = step_rows * steps, size = shape.in * shape.out;
  const Index saved = size * (3 * moved + kPassesOfAStep * kCostOfAPass * steps);
  const Index spent = 2 * (shape.in + shape.out) * moved * (query_rows + moved + task_rows);
  const double outgrown = static_cast<double>(std::min(size, kCachedElements)) / kCachedElements;
  return static_cast<double>(spent) < kSafeShare * outgrown * static_cast<double>(saved);
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
void add_product(Run<T>& run, const ProductShape& shape, const Factors<T>& w, const T* a, Index lda,
                 T* y) {
  if (w.rows == 0) return;
  add_through(run, run.examples() * shape.positions, shape.in, a, lda, w.left, w.rows, w.right,
              shape.out, y);
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
  const int none = plain && wanted && args.steps > 0 ? 0 : static_cast<int>(plan.ops.size());
  for (int i = none; i < static_cast<int>(plan.ops.size()); ++i) {
    const Op<T>& op = *plan.ops[i];
    Weight weight;
    weight.shape = op.product_shape();
    if (weight.shape.positions == 0) continue;
    weight.slot = op.slots[0];
    const PackedSlot& slot = plan.slots[weight.slot];
    const bool moves = (plan.storages[op.inputs[0]].depends & kTheta) != 0;
    const Index query_rows = args.query_examples * weight.shape.positions;
    weight.step_rows = args.support_examples * weight.shape.positions;
    weight.task_rows = query_rows;
    if (!args.first_order) weight.task_rows += args.steps * weight.step_rows * (moves ? 2 : 1);
    weight.lda = weight.shape.lda;
    weight.offset = slot.packed;
    const Index bytes = args.tasks * weight.task_rows * (left_ld(weight) + right_ld(weight)) *
                        static_cast<Index>(sizeof(T));
    if (!slot.adapted || uses_of(plan, weight.slot) != 1 || bytes > kMostRowBytes) continue;
    if (!pays(weight.shape, weight.step_rows, query_rows, weight.task_rows, args.steps)) continue;
    for (int team = 0; team < teams; ++team) {
      weight.moved.push_back(take(memory, weight, args.steps * weight.step_rows));
    }
    weight.adjoint = take(memory, weight, args.tasks * weight.task_rows);
    weights_.push_back(std::move(weight));
  }
  find_others();
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
    std::copy(x + row * weight.lda, x + row * weight.lda + in, a);
    std::fill(a + in, a + left, T(0));
    T* b = to.right.get() + (at + row) * right;
    for (Index i = 0; i < right; ++i) b[i] = scale * gy[row * right + i];
  }
}

template <typename T>
void FactoredWeights<T>::add_step(Run<T>& run, Index k, T scale) const {
  for (const Weight& weight : weights_) {
    const Pairs<T>& noted = run.first.noted[weight.slot];
    if (noted) {
      append(run, weight, weight.moved[run.member.team], k * weight.step_rows, noted.a[0],
             noted.b[0], scale);
    }
  }
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
    const Index begin = task * weight.task_rows + view.adjoint_rows[i];
    const Index end = (task + 1) * weight.task_rows;
    T* right = weight.adjoint.right.get();
    std::fill(right + begin * right_ld(weight), right + end * right_ld(weight), T(0));
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

#define FASTMAML_INSTANTIATE(T)                                                                  \
  template void add_product<T>(Run<T>&, const ProductShape&, const Factors<T>&, const T*, Index, \
                               T*);                                                              \
  template void add_transposed_product<T>(Run<T>&, const ProductShape&, const Factors<T>&,       \
                                          const T*, T*);                                         \
  template class FactoredWeights<T>;
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)
#undef FASTMAML_INSTANTIATE

}  // namespace fastmaml
