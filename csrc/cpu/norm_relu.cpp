#include "norm_relu.h"

#include <type_traits>

#include "norm_rows.h"
#include "vector_math.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// A line is one row of windows: outputs [out, out + count), and the first row of the first window.
// body(out, first). Backward, from the last line to the first, it finds in the cache what a pass
// before it went over last.
template <int W, bool kBackward = false, typename Body>
FASTMAML_INLINE void for_lines(const NormReluShape& shape, Body body) {
  const Index images = shape.images, lines = shape.height / W, count = shape.width / W;
  for (Index i = 0; i < images; ++i) {
    const Index image = kBackward ? images - 1 - i : i;
    for (Index l = 0; l < lines; ++l) {
      const Index line = kBackward ? lines - 1 - l : l;
      body((image * lines + line) * count, (image * shape.height + line * W) * shape.width);
    }
  }
}

// body(row) for the rows that no window covers.
template <int W, typename Body>
FASTMAML_INLINE void for_uncovered(const NormReluShape& shape, Body body) {
  const Index covered = shape.width / W * W;
  for (Index image = 0; image < shape.images; ++image) {
    for (Index h = 0; h < shape.height; ++h) {
      const Index begin = h < shape.height / W * W ? covered : 0;
      for (Index w = begin; w < shape.width; ++w) {
        body((image * shape.height + h) * shape.width + w);
      }
    }
  }
}

template <int W>
FASTMAML_INLINE Index place_in_window(const NormReluShape& shape, int i) {
  return i / W * shape.width + i % W;
}

// Where one row of outputs came from; with W = 1: what it was before the ReLU.
template <typename T, int NV, int W>
struct Origin {
  Row<T, NV> from;

  FASTMAML_INLINE MaskVec<T> mask(int place, int j) const {
    if (W == 1) return from.v[j] > Vec<T>{};
    return from.v[j] == broadcast(static_cast<T>(place));
  }
  // `value` in the lanes that came from this place of the window, zero in the others.
  FASTMAML_INLINE Row<T, NV> only(int place, Row<T, NV> value) const {
    for (int j = 0; j < NV; ++j) value.v[j] = select<T>(mask(place, j), value.v[j], Vec<T>{});
    return value;
  }
  FASTMAML_INLINE Row<T, NV> where_on(Row<T, NV> value) const {
    if (W == 1) return only(0, value);
    for (int j = 0; j < NV; ++j) {
      value.v[j] = select<T>(from.v[j] >= Vec<T>{}, value.v[j], Vec<T>{});
    }
    return value;
  }
};

// One panel of channels, with what every pass needs of it in registers.
template <typename T, int NV, int W>
struct Panel {
  using R = Row<T, NV>;
  static constexpr int kWindow = W, kPlaces = W * W;

  const NormReluShape& shape;
  const NormReluState<T>& state;
  Index ld, c;
  R mean, inv_std, gamma, beta;

  FASTMAML_INLINE Panel(const NormReluShape& shape, const NormReluState<T>& state, Index c)
      : shape(shape),
        state(state),
        ld(padded_to_lanes<T>(shape.channels)),
        c(c),
        mean(R::at(state.mean + c)),
        inv_std(R::at(state.inv_std + c)),
        gamma(R::at_or(state.gamma ? state.gamma + c : nullptr, 1)),
        beta(R::at_or(state.beta ? state.beta + c : nullptr, 0)) {}

  FASTMAML_INLINE Index at(Index row) const { return row * ld + c; }
  FASTMAML_INLINE Index rows() const { return shape.images * shape.height * shape.width; }
  FASTMAML_INLINE R per_row() const { return R::fill(T(1) / static_cast<T>(rows())); }
  FASTMAML_INLINE R xhat(Index row) const { return xhat_of(R::at(state.x + at(row))); }
  FASTMAML_INLINE R normalised(Index row) const { return multiply_add(gamma, xhat(row), beta); }
  FASTMAML_INLINE Origin<T, NV, W> origin(Index out) const {
    return {W == 1 ? normalised(out) : R::at(state.origin + at(out))};
  }
  FASTMAML_INLINE Index place(int i) const { return place_in_window<W>(shape, i); }
  // Of the window that starts at `first`, the row of `rows` [like x] that its output came from, or
  // any where the ReLU is off.
  FASTMAML_INLINE R winner(const Origin<T, NV, W>& origin, const T* rows, Index first) const {
    R best = R::at(rows + at(first));
    for (int i = 1; i < kPlaces; ++i) {
      const R here = R::at(rows + at(first + place(i)));
      for (int j = 0; j < NV; ++j) best.v[j] = select<T>(origin.mask(i, j), here.v[j], best.v[j]);
    }
    return best;
  }
  FASTMAML_INLINE R xhat_of(const R& x) const { return (x - mean) * inv_std; }
  FASTMAML_INLINE Index outputs_in_line() const { return shape.width / W; }

  // Sums over outputs, line by line: add(output row, first row of its window, &sums).
  template <typename Add>
  FASTMAML_INLINE Sums<R> sums(Add add) const {
    Sums<R> total = {R::fill(0), R::fill(0)};
    for_lines<W>(shape, [&](Index out, Index first) {
      Sums<R> part = {R::fill(0), R::fill(0)};
      for (Index q = 0; q < outputs_in_line(); ++q) add(out + q, first + q * W, &part);
      total.a = total.a + part.a;
      total.b = total.b + part.b;
    });
    return total;
  }

  // Every input row once: in_window(output row, row, place in the window), or outside(row).
  template <typename InWindow, typename Outside>
  FASTMAML_INLINE void for_inputs(InWindow in_window, Outside outside) const {
    for_lines<W, true>(shape, [&](Index out, Index first) {
      for (Index q = 0; q < outputs_in_line(); ++q) {
        for (int i = 0; i < W * W; ++i) in_window(out + q, first + q * W + place(i), i);
      }
    });
    if (W > 1) for_uncovered<W>(shape, outside);
  }
};

// The tangent of xhat, from that of x.
template <typename T, int NV, int W>
struct TangentPanel {
  using R = Row<T, NV>;
  const Panel<T, NV, W>& panel;
  const T* dx;
  R mean, slope;

  FASTMAML_INLINE TangentPanel(const Panel<T, NV, W>& panel, const NormReluTangent<T>& tangent)
      : panel(panel),
        dx(tangent.dx),
        mean(R::at(tangent.mean_dx + panel.c)),
        slope(R::fill(0) - R::at(tangent.mean_dx_xhat + panel.c)) {}

  FASTMAML_INLINE R dxhat(Index row, const R& xhat) const {
    if (dx == nullptr) return R::fill(0);
    return dxhat_of(R::at(dx + panel.at(row)), xhat);
  }
  FASTMAML_INLINE R dxhat_of_winner(const Origin<T, NV, W>& origin, Index first,
                                    const R& xhat) const {
    if (dx == nullptr) return R::fill(0);
    return dxhat_of(panel.winner(origin, dx, first), xhat);
  }
  FASTMAML_INLINE R dxhat_of(const R& dx, const R& xhat) const {
    return panel.inv_std * multiply_add(slope, xhat, dx - mean);
  }
};

// body(window as a type, row tag, first channel) for every panel of the share.
template <typename T, typename Body>
FASTMAML_INLINE void for_window_panels(const NormReluShape& shape, Share share, Body body) {
  for_panels<T>(shape.channels, share, [&](auto tag, Index c) {
    constexpr int NV = sizeof(tag) / sizeof(Vec<T>);
    if (shape.window == 1) {
      body(static_cast<Panel<T, NV, 1>*>(nullptr), c);
    } else {
      body(static_cast<Panel<T, NV, 2>*>(nullptr), c);
    }
  });
}

template <typename T, int NV, int W>
FASTMAML_INLINE void normalise_and_pool(const Panel<T, NV, W>& panel) {
  using R = Row<T, NV>;
  for_lines<W>(panel.shape, [&](Index out, Index first) {
    for (Index q = 0; q < panel.outputs_in_line(); ++q) {
      R best = panel.normalised(first + q * W), from = R::fill(0);
      for (int i = 1; i < W * W; ++i) {
        const R value = panel.normalised(first + q * W + panel.place(i));
        for (int j = 0; j < NV; ++j) {
          const MaskVec<T> better = (value.v[j] > best.v[j]) | (value.v[j] != value.v[j]);
          best.v[j] = select<T>(better, value.v[j], best.v[j]);
          from.v[j] = select<T>(better, broadcast(static_cast<T>(i)), from.v[j]);
        }
      }
      for (int j = 0; j < NV; ++j) {
        const MaskVec<T> off = best.v[j] <= Vec<T>{};
        best.v[j] = select<T>(off, Vec<T>{}, best.v[j]);
        from.v[j] = select<T>(off, broadcast(T(-1)), from.v[j]);
      }
      best.put(panel.state.y + panel.at(out + q));
      if (W > 1) from.put(panel.state.origin + panel.at(out + q));
    }
  });
}

}  // namespace

template <typename T>
void norm_relu_forward(const NormReluShape& shape, const NormReluState<T>& state, T eps,
                       Share share) {
  const Index rows = shape.images * shape.height * shape.width;
  const Index ld = padded_to_lanes<T>(shape.channels);
  for_window_panels<T>(shape, share, [&](auto* tag, Index c) {
    using P = std::remove_pointer_t<decltype(tag)>;
    using R = typename P::R;
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const Moments<R> stats = moments<T, NV>(rows, ld, state.x + c);
    stats.mean.put(state.mean + c);
    stats.variance.put(state.variance + c);
    inverse_std(stats.variance, eps).put(state.inv_std + c);
    normalise_and_pool(P(shape, state, c));
  });
}

template <typename T>
void norm_relu_backward(const NormReluShape& shape, const NormReluState<T>& state, const T* gy,
                        T* gx, bool accumulate, T* ggamma, T* gbeta, Share share) {
  for_window_panels<T>(shape, share, [&](auto* tag, Index c) {
    using P = std::remove_pointer_t<decltype(tag)>;
    using R = typename P::R;
    const P panel(shape, state, c);
    const Sums<R> sums = panel.sums([&](Index out, Index first, Sums<R>* part) {
      const auto origin = panel.origin(out);
      const R g = origin.where_on(R::at(gy + panel.at(out)));
      part->a = multiply_add(g, panel.xhat_of(panel.winner(origin, state.x, first)), part->a);
      part->b = part->b + g;
    });
    sums.a.put(ggamma + c);
    sums.b.put(gbeta + c);
    if (!gx) return;
    const R zero = R::fill(0), per_row = panel.per_row();
    const R slope = zero - sums.a * per_row, mean = sums.b * per_row;
    const R scale = panel.gamma * panel.inv_std;
    const auto put = [&](Index row, const R& g) {
      (scale * multiply_add(slope, panel.xhat(row), g - mean))
          .put_or_add(gx + panel.at(row), accumulate);
    };
    panel.for_inputs([&](Index out, Index row,
                         int i) { put(row, panel.origin(out).only(i, R::at(gy + panel.at(out)))); },
                     [&](Index row) { put(row, zero); });
  });
}

template <typename T>
void norm_relu_tangent(const NormReluShape& shape, const NormReluState<T>& state,
                       const NormReluTangent<T>& tangent, const T* dbeta, T* dy, Share share) {
  for_window_panels<T>(shape, share, [&](auto* tag, Index c) {
    using P = std::remove_pointer_t<decltype(tag)>;
    using R = typename P::R;
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const P panel(shape, state, c);
    Sums<R> sums = {R::fill(0), R::fill(0)};
    if (tangent.dx) {
      sums = column_pair_sums<T, NV>(panel.rows(), [&](Index row, Sums<R>* part) {
        const R d = R::at(tangent.dx + panel.at(row));
        part->a = multiply_add(d, panel.xhat(row), part->a);
        part->b = part->b + d;
      });
    }
    (sums.a * panel.per_row()).put(tangent.mean_dx_xhat + c);
    (sums.b * panel.per_row()).put(tangent.mean_dx + c);
    const TangentPanel<T, NV, P::kWindow> moved(panel, tangent);
    const R dg = R::at_or(tangent.dgamma ? tangent.dgamma + c : nullptr, 0);
    const R db = R::at_or(dbeta ? dbeta + c : nullptr, 0);
    for_lines<P::kWindow>(shape, [&](Index out, Index first) {
      for (Index q = 0; q < panel.outputs_in_line(); ++q) {
        const auto origin = panel.origin(out + q);
        const Index window = first + q * P::kWindow;
        const R h = panel.xhat_of(panel.winner(origin, state.x, window));
        const R dh = moved.dxhat_of_winner(origin, window, h);
        origin.where_on(multiply_add(panel.gamma, dh, multiply_add(dg, h, db)))
            .put(dy + panel.at(out + q));
      }
    });
  });
}

template <typename T>
void norm_relu_backward_tangent(const NormReluShape& shape, const NormReluState<T>& state,
                                const NormReluTangent<T>& tangent, const T* gy, const T* dgy,
                                const T* ggamma, const T* gbeta, T* dgx, bool accumulate,
                                T* dggamma, T* dgbeta, Share share) {
  for_window_panels<T>(shape, share, [&](auto* tag, Index c) {
    using P = std::remove_pointer_t<decltype(tag)>;
    using R = typename P::R;
    constexpr int NV = sizeof(R) / sizeof(Vec<T>);
    const P panel(shape, state, c);
    const TangentPanel<T, NV, P::kWindow> moved(panel, tangent);
    const R zero = R::fill(0), per_row = panel.per_row();
    const auto second = [&](Index out) { return dgy ? R::at(dgy + panel.at(out)) : zero; };
    const Sums<R> sums = panel.sums([&](Index out, Index first, Sums<R>* part) {
      const auto origin = panel.origin(out);
      const R g = R::at(gy + panel.at(out)), d = second(out);
      const R h = panel.xhat_of(panel.winner(origin, state.x, first));
      const R dh = moved.dxhat_of_winner(origin, first, h);
      part->a = part->a + origin.where_on(multiply_add(d, h, g * dh));
      part->b = part->b + origin.where_on(d);
    });
    sums.a.put(dggamma + c);
    sums.b.put(dgbeta + c);
    if (!dgx) return;
    // gx = scale * q with q = g - mean - xhat * slope, so dgx = dscale * q + scale * dq, where the
    // tangent of inv_std is -inv_std^2 mean(dx xhat).
    const R scale = panel.gamma * panel.inv_std;
    const R dg = R::at_or(tangent.dgamma ? tangent.dgamma + c : nullptr, 0);
    const R dscale = panel.inv_std * dg + panel.inv_std * scale * moved.slope;
    const R slope = zero - R::at(ggamma + c) * per_row, mean = R::at(gbeta + c) * per_row;
    const R dslope = zero - sums.a * per_row, dmean = sums.b * per_row;
    const auto put = [&](Index row, const R& g, const R& d) {
      const R h = panel.xhat(row);
      const R q = multiply_add(slope, h, g - mean);
      const R dq = multiply_add(slope, moved.dxhat(row, h), multiply_add(dslope, h, d - dmean));
      multiply_add(dscale, q, scale * dq).put_or_add(dgx + panel.at(row), accumulate);
    };
    panel.for_inputs(
        [&](Index out, Index row, int i) {
          const auto origin = panel.origin(out);
          put(row, origin.only(i, R::at(gy + panel.at(out))), origin.only(i, second(out)));
        },
        [&](Index row) { put(row, zero, zero); });
  });
}

#define FASTMAML_INSTANTIATE(T)                                                                    \
  template void norm_relu_forward<T>(const NormReluShape&, const NormReluState<T>&, T, Share);     \
  template void norm_relu_backward<T>(const NormReluShape&, const NormReluState<T>&, const T*, T*, \
                                      bool, T*, T*, Share);                                        \
  template void norm_relu_tangent<T>(const NormReluShape&, const NormReluState<T>&,                \
                                     const NormReluTangent<T>&, const T*, T*, Share);              \
  template void norm_relu_backward_tangent<T>(const NormReluShape&, const NormReluState<T>&,       \
                                              const NormReluTangent<T>&, const T*, const T*,       \
                                              const T*, const T*, T*, bool, T*, T*, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
