#include "norm.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

constexpr Index kBlockRows = 128;  // sums go block by block: rounding grows slower, L1 is reused

// NV vectors of channels of one row.
template <typename T, int NV>
struct Row {
  Vec<T> v[NV];

  static FASTMAML_INLINE Row fill(T x) {
    Row out;
    for (int j = 0; j < NV; ++j) out.v[j] = broadcast(x);
    return out;
  }
  static FASTMAML_INLINE Row at(const T* p) {
    Row out;
    for (int j = 0; j < NV; ++j) out.v[j] = load(p + j * kLanes<T>);
    return out;
  }
  static FASTMAML_INLINE Row at_or(const T* p, T otherwise) { return p ? at(p) : fill(otherwise); }
  FASTMAML_INLINE void put(T* p) const {
    for (int j = 0; j < NV; ++j) store(p + j * kLanes<T>, v[j]);
  }
  FASTMAML_INLINE void put_or_add(T* p, bool add) const { (add ? *this + at(p) : *this).put(p); }

  FASTMAML_INLINE Row operator+(const Row& o) const {
    Row out;
    for (int j = 0; j < NV; ++j) out.v[j] = v[j] + o.v[j];
    return out;
  }
  FASTMAML_INLINE Row operator-(const Row& o) const {
    Row out;
    for (int j = 0; j < NV; ++j) out.v[j] = v[j] - o.v[j];
    return out;
  }
  FASTMAML_INLINE Row operator*(const Row& o) const {
    Row out;
    for (int j = 0; j < NV; ++j) out.v[j] = v[j] * o.v[j];
    return out;
  }
};

template <typename T, int NV>
FASTMAML_INLINE Row<T, NV> multiply_add(const Row<T, NV>& a, const Row<T, NV>& b,
                                        const Row<T, NV>& c) {
  Row<T, NV> out;
  for (int j = 0; j < NV; ++j) out.v[j] = fma(a.v[j], b.v[j], c.v[j]);
  return out;
}

template <typename T, int NV>
FASTMAML_INLINE Row<T, NV> inverse_std(const Row<T, NV>& variance, T eps) {
  Row<T, NV> out;
  for (int j = 0; j < NV; ++j) {
    out.v[j] = broadcast(T(1)) / square_root<T>(variance.v[j] + broadcast(eps));
  }
  return out;
}

// Walks the share's channels in panels of up to two vectors: body(row tag, first channel).
template <typename T, typename Body>
FASTMAML_INLINE void for_panels(Index channels, Share share, Body body) {
  const Range mine = split(padded_to_lanes<T>(channels) / kLanes<T>, share);
  Index v = mine.begin;
  for (; v + 2 <= mine.end; v += 2) body(Row<T, 2>(), v * kLanes<T>);
  if (v < mine.end) body(Row<T, 1>(), v * kLanes<T>);
}

template <typename R>
struct Moments {
  R mean, variance;
};

// Two passes over each block while it is in the cache, blocks merged as Chan et al. (1983) do.
template <typename T, int NV>
FASTMAML_INLINE Moments<Row<T, NV>> moments(Index rows, Index ld, const T* x) {
  using R = Row<T, NV>;
  R mean = R::fill(0), squares = R::fill(0);
  for (Index first = 0; first < rows; first += kBlockRows) {
    const Index last = smaller(first + kBlockRows, rows), count = last - first;
    R sum = R::fill(0), block_squares = R::fill(0);
    for (Index i = first; i < last; ++i) sum = sum + R::at(x + i * ld);
    const R block_mean = sum * R::fill(T(1) / static_cast<T>(count));
    for (Index i = first; i < last; ++i) {
      const R difference = R::at(x + i * ld) - block_mean;
      block_squares = multiply_add(difference, difference, block_squares);
    }
    const R shift = block_mean - mean;
    const T part = static_cast<T>(count) / static_cast<T>(last);
    mean = multiply_add(shift, R::fill(part), mean);
    squares =
        squares + multiply_add(shift * shift, R::fill(part * static_cast<T>(first)), block_squares);
  }
  return {mean, squares * R::fill(T(1) / static_cast<T>(rows))};
}

template <typename R>
struct Sums {
  R a, b;
};

// Column sums of two terms per row: add(row, &sums).
template <typename T, int NV, typename Add>
FASTMAML_INLINE Sums<Row<T, NV>> column_pair_sums(Index rows, Add add) {
  using R = Row<T, NV>;
  Sums<R> total = {R::fill(0), R::fill(0)};
  for (Index first = 0; first < rows; first += kBlockRows) {
    const Index last = smaller(first + kBlockRows, rows);
    Sums<R> part = {R::fill(0), R::fill(0)};
    for (Index i = first; i < last; ++i) add(i, &part);
    total.a = total.a + part.a;
    total.b = total.b + part.b;
  }
  return total;
}

// Sums of gy * xhat (a) and of gy (b).
template <typename T, int NV>
FASTMAML_INLINE Sums<Row<T, NV>> gradient_sums(Index rows, Index ld, const T* gy, const T* xhat) {
  using R = Row<T, NV>;
  return column_pair_sums<T, NV>(rows, [&](Index i, Sums<R>* sums) {
    const R g = R::at(gy + i * ld);
    sums->a = multiply_add(g, R::at(xhat + i * ld), sums->a);
    sums->b = sums->b + g;
  });
}

// Their tangents: sums of dgy * xhat + gy * dxhat (a) and of dgy (b); dgy may be null.
template <typename T, int NV>
FASTMAML_INLINE Sums<Row<T, NV>> gradient_sum_tangents(Index rows, Index ld, const T* gy,
                                                       const T* dgy, const T* xhat,
                                                       const T* dxhat) {
  using R = Row<T, NV>;
  return column_pair_sums<T, NV>(rows, [&](Index i, Sums<R>* sums) {
    sums->a = multiply_add(R::at(gy + i * ld), R::at(dxhat + i * ld), sums->a);
    if (!dgy) return;
    const R dg = R::at(dgy + i * ld);
    sums->a = multiply_add(dg, R::at(xhat + i * ld), sums->a);
    sums->b = sums->b + dg;
  });
}

template <typename T, int NV>
FASTMAML_INLINE void normalise(Index rows, Index ld, const T* x, const Row<T, NV>& mean,
                               const Row<T, NV>& inv_std, const Row<T, NV>& gamma,
                               const Row<T, NV>& beta, T* xhat, T* y) {
  using R = Row<T, NV>;
  for (Index i = 0; i < rows; ++i) {
    const R h = (R::at(x + i * ld) - mean) * inv_std;
    h.put(xhat + i * ld);
    multiply_add(gamma, h, beta).put(y + i * ld);
  }
}

}  // namespace

template <typename T>
void norm_forward(Index rows, Index channels, const T* x, const T* gamma, const T* beta, T eps,
                  T* xhat, T* y, T* mean, T* variance, T* inv_std, Share share) {
  const Index ld = padded_to_lanes<T>(channels);
  for_panels<T>(channels, share, [&](auto tag, Index c) {
    using R = decltype(tag);
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const Moments<R> stats = moments<T, NV>(rows, ld, x + c);
    const R inverse = inverse_std(stats.variance, eps);
    stats.mean.put(mean + c);
    stats.variance.put(variance + c);
    inverse.put(inv_std + c);
    normalise<T, NV>(rows, ld, x + c, stats.mean, inverse, R::at_or(gamma ? gamma + c : nullptr, 1),
                     R::at_or(beta ? beta + c : nullptr, 0), xhat + c, y + c);
  });
}

template <typename T>
void norm_backward(Index rows, Index channels, const T* gy, const T* xhat, const T* gamma,
                   const T* inv_std, T* gx, bool accumulate, T* ggamma, T* gbeta, Share share) {
  const Index ld = padded_to_lanes<T>(channels);
  for_panels<T>(channels, share, [&](auto tag, Index c) {
    using R = decltype(tag);
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const Sums<R> sums = gradient_sums<T, NV>(rows, ld, gy + c, xhat + c);
    sums.a.put(ggamma + c);
    sums.b.put(gbeta + c);
    if (!gx) return;
    const R per_row = R::fill(T(1) / static_cast<T>(rows)), zero = R::fill(0);
    const R slope = zero - sums.a * per_row, mean = sums.b * per_row;
    const R scale = R::at_or(gamma ? gamma + c : nullptr, 1) * R::at(inv_std + c);
    for (Index i = 0; i < rows; ++i) {
      const Index at = i * ld + c;
      const R centred = R::at(gy + at) - mean;
      (scale * multiply_add(slope, R::at(xhat + at), centred)).put_or_add(gx + at, accumulate);
    }
  });
}

template <typename T>
void norm_tangent(Index rows, Index channels, const T* dx, const T* xhat, const T* gamma,
                  const T* dgamma, const T* dbeta, const T* inv_std, T* dxhat, T* dy, T* m,
                  Share share) {
  const Index ld = padded_to_lanes<T>(channels);
  for_panels<T>(channels, share, [&](auto tag, Index c) {
    using R = decltype(tag);
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const R zero = R::fill(0), per_row = R::fill(T(1) / static_cast<T>(rows));
    const Sums<R> sums =
        dx ? gradient_sums<T, NV>(rows, ld, dx + c, xhat + c) : Sums<R>{zero, zero};
    const R product = sums.a * per_row, mean = sums.b * per_row;
    product.put(m + c);
    const R inverse = R::at(inv_std + c), slope = zero - product;
    const R g = R::at_or(gamma ? gamma + c : nullptr, 1);
    const R dg = R::at_or(dgamma ? dgamma + c : nullptr, 0);
    const R db = R::at_or(dbeta ? dbeta + c : nullptr, 0);
    for (Index i = 0; i < rows; ++i) {
      const Index at = i * ld + c;
      const R h = R::at(xhat + at);
      const R dh = dx ? inverse * multiply_add(slope, h, R::at(dx + at) - mean) : zero;
      dh.put(dxhat + at);
      multiply_add(g, dh, multiply_add(dg, h, db)).put(dy + at);
    }
  });
}

template <typename T>
void norm_backward_tangent(Index rows, Index channels, const T* gy, const T* dgy, const T* xhat,
                           const T* dxhat, const T* gamma, const T* dgamma, const T* inv_std,
                           const T* m, const T* ggamma, const T* gbeta, T* dgx, bool accumulate,
                           T* dggamma, T* dgbeta, Share share) {
  const Index ld = padded_to_lanes<T>(channels);
  for_panels<T>(channels, share, [&](auto tag, Index c) {
    using R = decltype(tag);
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const Sums<R> sums = gradient_sum_tangents<T, NV>(rows, ld, gy + c, dgy ? dgy + c : nullptr,
                                                      xhat + c, dxhat + c);
    sums.a.put(dggamma + c);
    sums.b.put(dgbeta + c);
    if (!dgx) return;
    const R zero = R::fill(0), per_row = R::fill(T(1) / static_cast<T>(rows));
    const R inverse = R::at(inv_std + c), g = R::at_or(gamma ? gamma + c : nullptr, 1);
    // gx = scale * q with q = gy - mean - xhat * slope, so dgx = dscale * q + scale * dq, where
    // the tangent of inv_std is -inv_std^2 m.
    const R scale = g * inverse;
    const R dg = R::at_or(dgamma ? dgamma + c : nullptr, 0);
    const R dscale = inverse * dg - inverse * scale * R::at(m + c);
    const R slope = zero - R::at(ggamma + c) * per_row, mean = R::at(gbeta + c) * per_row;
    const R dslope = zero - sums.a * per_row, dmean = sums.b * per_row;
    for (Index i = 0; i < rows; ++i) {
      const Index at = i * ld + c;
      const R h = R::at(xhat + at);
      const R q = multiply_add(slope, h, R::at(gy + at) - mean);
      const R direct = dgy ? R::at(dgy + at) - dmean : zero - dmean;
      const R dq = multiply_add(slope, R::at(dxhat + at), multiply_add(dslope, h, direct));
      multiply_add(dscale, q, scale * dq).put_or_add(dgx + at, accumulate);
    }
  });
}

template <typename T>
void norm_eval_forward(Index rows, Index channels, const T* x, const T* mean, const T* variance,
                       T eps, const T* gamma, const T* beta, T* xhat, T* y, T* inv_std,
                       Share share) {
  const Index ld = padded_to_lanes<T>(channels);
  for_panels<T>(channels, share, [&](auto tag, Index c) {
    using R = decltype(tag);
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const R inverse = inverse_std(R::at(variance + c), eps);
    inverse.put(inv_std + c);
    normalise<T, NV>(rows, ld, x + c, R::at(mean + c), inverse,
                     R::at_or(gamma ? gamma + c : nullptr, 1),
                     R::at_or(beta ? beta + c : nullptr, 0), xhat + c, y + c);
  });
}

template <typename T>
void norm_eval_backward(Index rows, Index channels, const T* gy, const T* xhat, const T* gamma,
                        const T* inv_std, T* gx, bool accumulate, T* ggamma, T* gbeta,
                        Share share) {
  const Index ld = padded_to_lanes<T>(channels);
  for_panels<T>(channels, share, [&](auto tag, Index c) {
    using R = decltype(tag);
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const Sums<R> sums = gradient_sums<T, NV>(rows, ld, gy + c, xhat + c);
    sums.a.put(ggamma + c);
    sums.b.put(gbeta + c);
    if (!gx) return;
    const R scale = R::at_or(gamma ? gamma + c : nullptr, 1) * R::at(inv_std + c);
    for (Index i = 0; i < rows; ++i) {
      (scale * R::at(gy + i * ld + c)).put_or_add(gx + i * ld + c, accumulate);
    }
  });
}

template <typename T>
void norm_eval_tangent(Index rows, Index channels, const T* dx, const T* xhat, const T* gamma,
                       const T* dgamma, const T* dbeta, const T* inv_std, T* dxhat, T* dy,
                       Share share) {
  const Index ld = padded_to_lanes<T>(channels);
  for_panels<T>(channels, share, [&](auto tag, Index c) {
    using R = decltype(tag);
    const R inverse = R::at(inv_std + c), g = R::at_or(gamma ? gamma + c : nullptr, 1);
    const R dg = R::at_or(dgamma ? dgamma + c : nullptr, 0);
    const R db = R::at_or(dbeta ? dbeta + c : nullptr, 0);
    for (Index i = 0; i < rows; ++i) {
      const Index at = i * ld + c;
      const R dh = dx ? inverse * R::at(dx + at) : R::fill(0);
      dh.put(dxhat + at);
      multiply_add(g, dh, multiply_add(dg, R::at(xhat + at), db)).put(dy + at);
    }
  });
}

template <typename T>
void norm_eval_backward_tangent(Index rows, Index channels, const T* gy, const T* dgy,
                                const T* xhat, const T* dxhat, const T* gamma, const T* dgamma,
                                const T* inv_std, T* dgx, bool accumulate, T* dggamma, T* dgbeta,
                                Share share) {
  const Index ld = padded_to_lanes<T>(channels);
  for_panels<T>(channels, share, [&](auto tag, Index c) {
    using R = decltype(tag);
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const Sums<R> sums = gradient_sum_tangents<T, NV>(rows, ld, gy + c, dgy ? dgy + c : nullptr,
                                                      xhat + c, dxhat + c);
    sums.a.put(dggamma + c);
    sums.b.put(dgbeta + c);
    if (!dgx) return;
    const R inverse = R::at(inv_std + c);
    const R scale = R::at_or(gamma ? gamma + c : nullptr, 1) * inverse;
    const R dscale = R::at_or(dgamma ? dgamma + c : nullptr, 0) * inverse;
    for (Index i = 0; i < rows; ++i) {
      const Index at = i * ld + c;
      const R direct = dscale * R::at(gy + at);
      const R value = dgy ? multiply_add(scale, R::at(dgy + at), direct) : direct;
      value.put_or_add(dgx + at, accumulate);
    }
  });
}

#define FASTMAML_INSTANTIATE(T)                                                                    \
  template void norm_forward<T>(Index, Index, const T*, const T*, const T*, T, T*, T*, T*, T*, T*, \
                                Share);                                                            \
  template void norm_backward<T>(Index, Index, const T*, const T*, const T*, const T*, T*, bool,   \
                                 T*, T*, Share);                                                   \
  template void norm_tangent<T>(Index, Index, const T*, const T*, const T*, const T*, const T*,    \
                                const T*, T*, T*, T*, Share);                                      \
  template void norm_backward_tangent<T>(Index, Index, const T*, const T*, const T*, const T*,     \
                                         const T*, const T*, const T*, const T*, const T*,         \
                                         const T*, T*, bool, T*, T*, Share);                       \
  template void norm_eval_forward<T>(Index, Index, const T*, const T*, const T*, T, const T*,      \
                                     const T*, T*, T*, T*, Share);                                 \
  template void norm_eval_backward<T>(Index, Index, const T*, const T*, const T*, const T*, T*,    \
                                      bool, T*, T*, Share);                                        \
  template void norm_eval_tangent<T>(Index, Index, const T*, const T*, const T*, const T*,         \
                                     const T*, const T*, T*, T*, Share);                           \
  template void norm_eval_backward_tangent<T>(Index, Index, const T*, const T*, const T*,          \
                                              const T*, const T*, const T*, const T*, T*, bool,    \
                                              T*, T*, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
