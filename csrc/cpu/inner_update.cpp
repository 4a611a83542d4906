// The inner update rule, element by element; fastmaml/program/updates.py is its specification.
#include "inner_update.h"

#include "vector_math.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// Zero at zero.
template <typename T>
FASTMAML_INLINE Vec<T> reciprocal(Vec<T> x) {
  return select<T>(x == Vec<T>{}, Vec<T>{}, broadcast(T(1)) / x);
}

template <typename T>
FASTMAML_INLINE Vec<T> load_or_zero(const T* p, Index i) {
  return p == nullptr ? Vec<T>{} : load(p + i);
}

// The coefficients of one vector of elements.
template <typename T>
class Coefficients {
 public:
  FASTMAML_INLINE explicit Coefficients(const InnerStep<T>& step) : step_(step) {
    for (int c = 0; c < kInnerCoefficients; ++c) alike_[c] = broadcast(step.coefficients[c][0]);
  }
  FASTMAML_INLINE Vec<T> at(InnerCoefficient c, Index i) const {
    return step_.each[c] ? load(step_.coefficients[c] + i) : alike_[c];
  }

 private:
  const InnerStep<T>& step_;
  Vec<T> alike_[kInnerCoefficients];
};

// Values on the way through the formula.
template <typename T>
struct Parts {
  Vec<T> raw, limited, theta, g, old_m, old_v, v, root, n, x, m, direction, move;
};

template <typename T, bool kSecond, bool kFirst, bool kNesterov>
FASTMAML_INLINE Parts<T> parts_at(const InnerStep<T>& step, const Coefficients<T>& c, Index i) {
  Parts<T> p;
  p.theta = load(step.theta + i);
  p.raw = load(step.gradient + i);
  const Vec<T> bound = broadcast(step.clip_value);
  p.limited = broadcast(step.clip_factor) * p.raw;
  p.limited = select<T>(p.limited > bound, bound, p.limited);
  p.limited = select<T>(p.limited < -bound, -bound, p.limited);
  p.g = fma(c.at(kInnerL2, i), p.theta, p.limited);
  p.old_m = load_or_zero(step.m, i);
  p.old_v = load_or_zero(step.v, i);
  p.v = p.root = p.n = Vec<T>{};
  p.x = p.g;
  if (kSecond) {
    p.v = fma(c.at(kInnerKeepV, i), p.old_v, c.at(kInnerTakeV, i) * p.g * p.g);
    p.root = square_root<T>(p.v);
    p.n = reciprocal<T>(fma(c.at(kInnerScale, i), p.root, c.at(kInnerEps, i)));
    if (kFirst) p.x = p.g * p.n;
  }
  p.m = fma(c.at(kInnerKeepM, i), p.old_m, c.at(kInnerTakeM, i) * p.x);
  p.direction = kNesterov ? fma(c.at(kInnerKeepM, i), p.m, p.g) : p.m;
  p.move = kSecond && !kFirst ? p.direction * p.n : p.direction;
  return p;
}

template <typename T, bool kSecond, bool kFirst, bool kNesterov>
struct Update {
  static void run(Index count, const InnerStep<T>& step, T* theta, T* m, T* v, Share share) {
    const Coefficients<T> c(step);
    const Range mine = split_elements<T>(count, share);
    for (Index i = mine.begin; i < mine.end; i += kLanes<T>) {
      const Parts<T> p = parts_at<T, kSecond, kFirst, kNesterov>(step, c, i);
      store(theta + i, c.at(kInnerShrink, i) * p.theta - c.at(kInnerStep, i) * p.move);
      if (m != nullptr) store(m + i, p.m);
      if (v != nullptr) store(v + i, p.v);
    }
  }
};

template <typename T>
using ByCoefficient = Vec<T>[kInnerCoefficients];

template <typename T, bool kSecond, bool kFirst, bool kNesterov>
struct Adjoint {
  // Writes the cotangents of one vector; returns those on the coefficients in `d`.
  static FASTMAML_INLINE Vec<T> at(const InnerStep<T>& step, const InnerAdjoint<T>& a,
                                   const Coefficients<T>& c, Index i, ByCoefficient<T>& d) {
    const Parts<T> p = parts_at<T, kSecond, kFirst, kNesterov>(step, c, i);
    const Vec<T> cotangent = load(a.theta + i);
    const Vec<T> keep_m = c.at(kInnerKeepM, i), d_move = -(c.at(kInnerStep, i) * cotangent);
    const Vec<T> d_direction = kSecond && !kFirst ? d_move * p.n : d_move;
    Vec<T> d_n = kSecond && !kFirst ? d_move * p.direction : Vec<T>{};
    Vec<T> d_g = kNesterov ? d_direction : Vec<T>{};
    Vec<T> d_m = kNesterov ? keep_m * d_direction : d_direction;
    d[kInnerKeepM] = kNesterov ? d_direction * p.m : Vec<T>{};
    if (a.m != nullptr && a.has_moments) d_m += load(a.m + i);
    const Vec<T> d_x = c.at(kInnerTakeM, i) * d_m;
    d_g += kSecond && kFirst ? d_x * p.n : d_x;
    if (kSecond && kFirst) d_n = d_x * p.g;
    d[kInnerKeepV] = d[kInnerTakeV] = d[kInnerScale] = d[kInnerEps] = Vec<T>{};
    if (kSecond) {
      d[kInnerEps] = -(d_n * p.n * p.n);
      d[kInnerScale] = d[kInnerEps] * p.root;
      Vec<T> d_v = broadcast(T(0.5)) * c.at(kInnerScale, i) * d[kInnerEps] * reciprocal<T>(p.root);
      if (a.has_moments) d_v += load(a.v + i);
      d_g = fma(broadcast(T(2)) * c.at(kInnerTakeV, i) * p.g, d_v, d_g);
      d[kInnerKeepV] = d_v * p.old_v;
      d[kInnerTakeV] = d_v * p.g * p.g;
      store(a.v + i, c.at(kInnerKeepV, i) * d_v);
    }
    if (a.m != nullptr) store(a.m + i, keep_m * d_m);
    d[kInnerStep] = -(cotangent * p.move);
    d[kInnerShrink] = cotangent * p.theta;
    d[kInnerL2] = d_g * p.theta;
    d[kInnerKeepM] = fma(d_m, p.old_m, d[kInnerKeepM]);
    d[kInnerTakeM] = d_m * p.x;
    store(a.theta + i, fma(c.at(kInnerL2, i), d_g, c.at(kInnerShrink, i) * cotangent));
    const Vec<T> bound = broadcast(step.clip_value);
    const Vec<T> scaled = broadcast(step.clip_factor) * p.raw;
    const Vec<T> free = select<T>(absolute<T>(scaled) <= bound, d_g, Vec<T>{});
    store(a.gradient + i, broadcast(step.clip_factor) * free);
    return free * p.raw;
  }

  static void run(Index count, const InnerStep<T>& step, const InnerAdjoint<T>& a, Share share) {
    const Coefficients<T> c(step);
    const Index blocks = divide_up(count, kInnerBlock);
    const Range mine = split(blocks, share);
    for (Index block = mine.begin; block < mine.end; ++block) {
      Vec<T> along{}, d[kInnerCoefficients], sums[kInnerCoefficients] = {};
      const Index end = smaller(count, (block + 1) * kInnerBlock);
      for (Index i = block * kInnerBlock; i < end; i += kLanes<T>) {
        along += at(step, a, c, i, d);
        for (int k = 0; k < kInnerCoefficients; ++k) {
          if (a.each[k] != nullptr) store(a.each[k] + i, load(a.each[k] + i) + d[k]);
          if (a.sums[k] != nullptr) sums[k] += d[k];
        }
      }
      for (int k = 0; k < kInnerCoefficients; ++k) {
        if (a.sums[k] != nullptr) a.sums[k][block] = lane_sum<T>(sums[k]);
      }
      if (a.along != nullptr) a.along[block] = lane_sum<T>(along);
    }
  }
};

template <template <typename, bool, bool, bool> class Pass, typename T, typename... Args>
FASTMAML_INLINE void dispatch(Index count, const InnerStep<T>& step, Args... args) {
  if (step.second_moment && step.normalise_first) {
    Pass<T, true, true, false>::run(count, step, args...);
  } else if (step.second_moment) {
    Pass<T, true, false, false>::run(count, step, args...);
  } else if (step.nesterov) {
    Pass<T, false, false, true>::run(count, step, args...);
  } else {
    Pass<T, false, false, false>::run(count, step, args...);
  }
}

}  // namespace

template <typename T>
void inner_update(Index count, const InnerStep<T>& step, T* theta, T* m, T* v, Share share) {
  dispatch<Update>(count, step, theta, m, v, share);
}

template <typename T>
void inner_adjoint(Index count, const InnerStep<T>& step, const InnerAdjoint<T>& adjoint,
                   Share share) {
  dispatch<Adjoint, T, const InnerAdjoint<T>&>(count, step, adjoint, share);
}

template <typename T>
void block_products(Index count, const T* a, const T* b, T* sums, Share share) {
  const Range mine = split(divide_up(count, kInnerBlock), share);
  for (Index block = mine.begin; block < mine.end; ++block) {
    Vec<T> sum{};
    const Index end = smaller(count, (block + 1) * kInnerBlock);
    for (Index i = block * kInnerBlock; i < end; i += kLanes<T>) {
      sum = fma(load(a + i), load(b + i), sum);
    }
    sums[block] = lane_sum<T>(sum);
  }
}

#define FASTMAML_INSTANTIATE(T)                                                              \
  template void inner_update<T>(Index, const InnerStep<T>&, T*, T*, T*, Share);              \
  template void inner_adjoint<T>(Index, const InnerStep<T>&, const InnerAdjoint<T>&, Share); \
  template void block_products<T>(Index, const T*, const T*, T*, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
