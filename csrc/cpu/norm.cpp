#include "norm.h"

#include "norm_rows.h"

namespace fastmaml {
namespace FASTMAML_ISA {
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
