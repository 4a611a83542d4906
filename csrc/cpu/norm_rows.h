// Rows of channels in registers, and the sums over rows that normalisation is made of.
#pragma once

#include "simd.h"

namespace fastmaml {
namespace FASTMAML_ISA {

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

// The sum of value(i) over [first, last), in two chains, since one would wait for itself.
template <typename T, int NV, typename Value>
FASTMAML_INLINE Row<T, NV> sum_of_rows(Index first, Index last, Value value) {
  Row<T, NV> even = Row<T, NV>::fill(0), odd = even;
  Index i = first;
  for (; i + 2 <= last; i += 2) {
    even = even + value(i);
    odd = odd + value(i + 1);
  }
  if (i < last) even = even + value(i);
  return even + odd;
}

template <typename R>
struct Moments {
  R mean, variance;
};

// Two passes over each block while it is in the cache, blocks merged as Chan et al. (1983) do. From
// the last row to the first: whoever wrote x came by there last.
template <typename T, int NV>
FASTMAML_INLINE Moments<Row<T, NV>> moments(Index rows, Index ld, const T* x) {
  using R = Row<T, NV>;
  R mean = R::fill(0), squares = R::fill(0);
  for (Index last = rows; last > 0; last -= kBlockRows) {
    const Index first = larger(last - kBlockRows, 0), count = last - first;
    const R sum = sum_of_rows<T, NV>(first, last, [&](Index i) { return R::at(x + i * ld); });
    const R block_mean = sum * R::fill(T(1) / static_cast<T>(count));
    const R block_squares = sum_of_rows<T, NV>(first, last, [&](Index i) {
      const R difference = R::at(x + i * ld) - block_mean;
      return difference * difference;
    });
    const R shift = block_mean - mean;
    const T part = static_cast<T>(count) / static_cast<T>(rows - first);
    mean = multiply_add(shift, R::fill(part), mean);
    squares = squares + multiply_add(shift * shift, R::fill(part * static_cast<T>(rows - last)),
                                     block_squares);
  }
  return {mean, squares * R::fill(T(1) / static_cast<T>(rows))};
}

template <typename R>
struct Sums {
  R a, b;
};

// Column sums of two terms per row, from the last to the first: add(row, &sums).
template <typename T, int NV, typename Add>
FASTMAML_INLINE Sums<Row<T, NV>> column_pair_sums(Index rows, Add add) {
  using R = Row<T, NV>;
  Sums<R> total = {R::fill(0), R::fill(0)};
  for (Index last = rows; last > 0; last -= kBlockRows) {
    const Index first = larger(last - kBlockRows, 0);
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

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
