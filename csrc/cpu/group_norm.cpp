#include "group_norm.h"

#include "norm_rows.h"
#include "scratch.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// One of the shape's sets of positions, and vectors over channels to work in.
template <typename T>
struct Set {
  GroupNormShape shape;
  Index index, ld;
  T* scratch;

  Index values() const { return index * shape.positions * ld; }
  Index channels() const { return index * ld; }
  Index groups() const { return index * shape.groups; }
  Index width() const { return shape.channels / shape.groups; }  // of a group
  T per_value() const { return T(1) / static_cast<T>(width() * shape.positions); }

  T* vector(Index i) const { return scratch + i * (ld + kLanes<T>); }
};

// body(set) for each that the share owns.
template <typename T, typename Body>
FASTMAML_INLINE void for_sets(const GroupNormShape& shape, Index vectors, Share share, Body body) {
  const Index ld = padded_to_lanes<T>(shape.channels);
  const Range mine = split(shape.sets, share);
  T* scratch = static_cast<T*>(thread_scratch(sizeof(T) * vectors * (ld + kLanes<T>)));
  for (Index i = mine.begin; i < mine.end; ++i) body(Set<T>{shape, i, ld, scratch});
}

// body(row tag, first channel) for all channels.
template <typename T, typename Body>
FASTMAML_INLINE void for_channels(const Set<T>& set, Body body) {
  for_panels<T>(set.shape.channels, Share{}, body);
}

template <typename R>
constexpr int kVectors = static_cast<int>(sizeof(R) / sizeof(R::v[0]));

template <typename T>
FASTMAML_INLINE T sum(const T* v, Index count) {
  Vec<T> total = broadcast(T(0));
  for (Index i = 0; i < count; i += kLanes<T>) total += load_up_to(v + i, count - i);
  return lane_sum<T>(total);
}
// <v, weight>; without weights each is `otherwise`.
template <typename T>
FASTMAML_INLINE T weighted_sum(const T* v, const T* weight, T otherwise, Index count) {
  if (weight == nullptr) return otherwise == T(0) ? T(0) : otherwise * sum(v, count);
  Vec<T> total = broadcast(T(0));
  for (Index i = 0; i < count; i += kLanes<T>) {
    total = fma(load_up_to(v + i, count - i), load_up_to(weight + i, count - i), total);
  }
  return lane_sum<T>(total);
}

// out[c] = value(group of c, its first channel); zero in padding.
template <typename T, typename Value>
FASTMAML_INLINE void spread(const Set<T>& set, T* out, Value value) {
  const Index width = set.width();
  for (Index g = 0; g < set.shape.groups; ++g) {
    const Vec<T> own = broadcast(value(g, g * width));
    // Whole vectors: what is too much is written over, or past the last channel.
    for (Index c = g * width; c < (g + 1) * width; c += kLanes<T>) store(out + c, own);
  }
  for (Index c = set.shape.channels; c < set.ld; ++c) out[c] = 0;
}

// out[c] = the group's mean over its values of what `sums` adds up over positions, times gamma.
template <typename T>
FASTMAML_INLINE void spread_means(const Set<T>& set, const T* sums, const T* gamma, T* out) {
  spread<T>(set, out, [&](Index, Index c) {
    return set.per_value() * weighted_sum(sums + c, gamma ? gamma + c : nullptr, T(1), set.width());
  });
}
// Its tangent.
template <typename T>
FASTMAML_INLINE void spread_mean_tangents(const Set<T>& set, const T* sums, const T* dsums,
                                          const T* gamma, const T* dgamma, T* out) {
  spread<T>(set, out, [&](Index, Index c) {
    const T moved = weighted_sum(dsums + c, gamma ? gamma + c : nullptr, T(1), set.width());
    return set.per_value() *
           (moved + weighted_sum(sums + c, dgamma ? dgamma + c : nullptr, T(0), set.width()));
  });
}
template <typename T>
FASTMAML_INLINE void spread_given(const Set<T>& set, const T* of_groups, T* out) {
  spread<T>(set, out, [&](Index g, Index) { return of_groups[set.groups() + g]; });
}

// Moments of each group, from those of its channels as Chan et al. (1983) merge them: its mean and
// 1 / standard deviation for each channel, and the latter for each group.
template <typename T>
FASTMAML_INLINE void group_moments(const Set<T>& set, const T* x, T eps, T* mean, T* inverse,
                                   T* inv_std) {
  const bool one_position = set.shape.positions == 1;  // channels have no variance of their own
  T *own_means = set.vector(2), *variances = set.vector(3);
  if (!one_position) {
    for_channels<T>(set, [&](auto tag, Index c) {
      using R = decltype(tag);
      const Moments<R> own = moments<T, kVectors<R>>(set.shape.positions, set.ld, x + c);
      own.mean.put(own_means + c);
      own.variance.put(variances + c);
    });
  }
  const T* means = one_position ? x : own_means;
  const T per_channel = T(1) / static_cast<T>(set.width());
  spread<T>(set, mean, [&](Index, Index c) { return per_channel * sum(means + c, set.width()); });
  for_channels<T>(set, [&](auto tag, Index c) {
    using R = decltype(tag);
    const R shift = R::at(means + c) - R::at(mean + c);
    multiply_add(shift, shift, one_position ? R::fill(0) : R::at(variances + c)).put(variances + c);
  });
  spread<T>(set, inverse, [&](Index g, Index c) {
    const T variance = per_channel * sum(variances + c, set.width());
    return inv_std[set.groups() + g] = inverse_std(Row<T, 1>::fill(variance), eps).v[0][0];
  });
}

}  // namespace

template <typename T>
void group_norm_forward(const GroupNormShape& shape, const T* x, const T* gamma, const T* beta,
                        T eps, T* xhat, T* y, T* inv_std, Share share) {
  for_sets<T>(shape, 4, share, [&](const Set<T>& set) {
    const Index base = set.values();
    T *mean = set.vector(0), *inverse = set.vector(1);
    group_moments(set, x + base, eps, mean, inverse, inv_std);
    for_channels<T>(set, [&](auto tag, Index c) {
      using R = decltype(tag);
      normalise<T, kVectors<R>>(shape.positions, set.ld, x + base + c, R::at(mean + c),
                                R::at(inverse + c), R::at_or(gamma ? gamma + c : nullptr, 1),
                                R::at_or(beta ? beta + c : nullptr, 0), xhat + base + c,
                                y + base + c);
    });
  });
}

template <typename T>
void group_norm_backward(const GroupNormShape& shape, const GroupNormState<T>& state, const T* gy,
                         T* gx, bool accumulate, T* ggamma, T* gbeta, Share share) {
  for_sets<T>(shape, 3, share, [&](const Set<T>& set) {
    const Index base = set.values();
    const T* xhat = state.xhat + base;
    T *products = ggamma + set.channels(), *sums = gbeta + set.channels();
    for_channels<T>(set, [&](auto tag, Index c) {
      using R = decltype(tag);
      const Sums<R> own =
          gradient_sums<T, kVectors<R>>(shape.positions, set.ld, gy + base + c, xhat + c);
      own.a.put(products + c);
      own.b.put(sums + c);
    });
    if (!gx) return;
    T *mean = set.vector(0), *along = set.vector(1), *inverse = set.vector(2);
    spread_means(set, sums, state.gamma, mean);
    spread_means(set, products, state.gamma, along);
    spread_given(set, state.inv_std, inverse);
    for_channels<T>(set, [&](auto tag, Index c) {
      using R = decltype(tag);
      const R zero = R::fill(0), level = zero - R::at(mean + c), slope = zero - R::at(along + c);
      const R scale = R::at(inverse + c);
      const R weight = R::at_or(state.gamma ? state.gamma + c : nullptr, 1);
      for (Index i = 0; i < shape.positions; ++i) {
        const Index at = base + i * set.ld + c;
        const R centred = multiply_add(weight, R::at(gy + at), level);
        (scale * multiply_add(slope, R::at(state.xhat + at), centred))
            .put_or_add(gx + at, accumulate);
      }
    });
  });
}

template <typename T>
void group_norm_tangent(const GroupNormShape& shape, const GroupNormState<T>& state,
                        const GroupNormTangent<T>& tangent, const T* dx, const T* dbeta, T* dy,
                        Share share) {
  for_sets<T>(shape, 5, share, [&](const Set<T>& set) {
    const Index base = set.values();
    T *sums = set.vector(0), *products = set.vector(1);
    T *mean = set.vector(2), *along = set.vector(3), *inverse = set.vector(4);
    for_channels<T>(set, [&](auto tag, Index c) {
      using R = decltype(tag);
      const Sums<R> own = dx ? gradient_sums<T, kVectors<R>>(shape.positions, set.ld, dx + base + c,
                                                             state.xhat + base + c)
                             : Sums<R>{R::fill(0), R::fill(0)};
      own.b.put(sums + c);
      own.a.put(products + c);
    });
    spread_means<T>(set, sums, nullptr, mean);
    spread_means<T>(set, products, nullptr, along);
    spread_given(set, state.inv_std, inverse);
    for (Index g = 0; g < shape.groups; ++g) {
      tangent.mean_dx_xhat[set.groups() + g] = along[g * set.width()];
    }
    for_channels<T>(set, [&](auto tag, Index c) {
      using R = decltype(tag);
      const R zero = R::fill(0), level = R::at(mean + c), slope = zero - R::at(along + c);
      const R scale = R::at(inverse + c);
      const R weight = R::at_or(state.gamma ? state.gamma + c : nullptr, 1);
      const R dweight = R::at_or(tangent.dgamma ? tangent.dgamma + c : nullptr, 0);
      const R shift = R::at_or(dbeta ? dbeta + c : nullptr, 0);
      for (Index i = 0; i < shape.positions; ++i) {
        const Index at = base + i * set.ld + c;
        const R h = R::at(state.xhat + at);
        const R dh = dx ? scale * multiply_add(slope, h, R::at(dx + at) - level) : zero;
        dh.put(tangent.dxhat + at);
        multiply_add(weight, dh, multiply_add(dweight, h, shift)).put(dy + at);
      }
    });
  });
}

template <typename T>
void group_norm_backward_tangent(const GroupNormShape& shape, const GroupNormState<T>& state,
                                 const GroupNormTangent<T>& tangent, const T* gy, const T* dgy,
                                 const T* ggamma, const T* gbeta, T* dgx, bool accumulate,
                                 T* dggamma, T* dgbeta, Share share) {
  for_sets<T>(shape, 6, share, [&](const Set<T>& set) {
    const Index base = set.values(), own_channels = set.channels();
    const T *products = ggamma + own_channels, *sums = gbeta + own_channels;
    T *dproducts = dggamma + own_channels, *dsums = dgbeta + own_channels;
    for_channels<T>(set, [&](auto tag, Index c) {
      using R = decltype(tag);
      const Sums<R> own = gradient_sum_tangents<T, kVectors<R>>(
          shape.positions, set.ld, gy + base + c, dgy ? dgy + base + c : nullptr,
          state.xhat + base + c, tangent.dxhat + base + c);
      own.a.put(dproducts + c);
      own.b.put(dsums + c);
    });
    if (!dgx) return;
    T *mean = set.vector(0), *along = set.vector(1), *inverse = set.vector(2);
    T *dmean = set.vector(3), *dalong = set.vector(4), *moment = set.vector(5);
    spread_means(set, sums, state.gamma, mean);
    spread_means(set, products, state.gamma, along);
    spread_mean_tangents(set, sums, dsums, state.gamma, tangent.dgamma, dmean);
    spread_mean_tangents(set, products, dproducts, state.gamma, tangent.dgamma, dalong);
    spread_given(set, state.inv_std, inverse);
    spread_given(set, tangent.mean_dx_xhat, moment);
    for_channels<T>(set, [&](auto tag, Index c) {
      using R = decltype(tag);
      // gx = inverse * q with q = u - mean - xhat * along and u = gamma * gy, so
      // dgx = inverse * dq - inverse^2 * moment * q.
      const R zero = R::fill(0), scale = R::at(inverse + c);
      const R level = zero - R::at(mean + c), slope = zero - R::at(along + c);
      const R dlevel = zero - R::at(dmean + c), dslope = zero - R::at(dalong + c);
      const R fall = zero - scale * R::at(moment + c);
      const R weight = R::at_or(state.gamma ? state.gamma + c : nullptr, 1);
      const R dweight = R::at_or(tangent.dgamma ? tangent.dgamma + c : nullptr, 0);
      for (Index i = 0; i < shape.positions; ++i) {
        const Index at = base + i * set.ld + c;
        const R g = R::at(gy + at), h = R::at(state.xhat + at);
        const R q = multiply_add(slope, h, multiply_add(weight, g, level));
        const R direct = dgy ? multiply_add(weight, R::at(dgy + at), dlevel) : dlevel;
        const R du = multiply_add(dweight, g, direct);
        const R dq = multiply_add(slope, R::at(tangent.dxhat + at), multiply_add(dslope, h, du));
        (scale * multiply_add(fall, q, dq)).put_or_add(dgx + at, accumulate);
      }
    });
  });
}

#define FASTMAML_INSTANTIATE(T)                                                                   \
  template void group_norm_forward<T>(const GroupNormShape&, const T*, const T*, const T*, T, T*, \
                                      T*, T*, Share);                                             \
  template void group_norm_backward<T>(const GroupNormShape&, const GroupNormState<T>&, const T*, \
                                       T*, bool, T*, T*, Share);                                  \
  template void group_norm_tangent<T>(const GroupNormShape&, const GroupNormState<T>&,            \
                                      const GroupNormTangent<T>&, const T*, const T*, T*, Share); \
  template void group_norm_backward_tangent<T>(const GroupNormShape&, const GroupNormState<T>&,   \
                                               const GroupNormTangent<T>&, const T*, const T*,    \
                                               const T*, const T*, T*, bool, T*, T*, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
