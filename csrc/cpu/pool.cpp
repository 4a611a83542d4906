#include "pool.h"

#include "vector_math.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// The share's (image, vector of channels) pairs, as runs of vectors of one image:
// body(image, first channel, end channel).
template <typename T, typename Body>
FASTMAML_INLINE void for_channels(Index images, Index ld, Share share, Body body) {
  const Index vectors = divide_up(ld, kLanes<T>);
  const Range mine = split(images * vectors, share);
  for (Index unit = mine.begin; unit < mine.end;) {
    const Index image = unit / vectors, start = image * vectors;
    const Index end = smaller(mine.end - start, vectors);
    body(image, (unit - start) * kLanes<T>, smaller(end * kLanes<T>, ld));
    unit = start + end;
  }
}

// body(input position) over one window.
template <typename Body>
FASTMAML_INLINE void for_window(const PoolGeometry& g, const PoolWindow& window, Body body) {
  for (int h = window.h0; h < window.h1; h += g.step_h) {
    for (int w = window.w0; w < window.w1; w += g.step_w) body(Index{h} * g.width + w);
  }
}

template <typename T>
FASTMAML_INLINE MaskVec<T> load_positions(const std::int32_t* p, Index count) {
  MaskVec<T> out = {};
  for (Index i = 0; i < kLanes<T>; ++i) {
    if (i < count) out[i] = p[i];
  }
  return out;
}
template <typename T>
FASTMAML_INLINE void store_positions(std::int32_t* p, MaskVec<T> v, Index count) {
  for (Index i = 0; i < kLanes<T>; ++i) {
    if (i < count) p[i] = static_cast<std::int32_t>(v[i]);
  }
}

template <typename T>
FASTMAML_INLINE MaskVec<T> all_lanes(Index value) {
  return MaskVec<T>{} + static_cast<typename VectorTypes<T>::Bits>(value);
}

template <typename T>
void clear_channels(T* x, Index positions, Index ld, Index begin, Index end) {
  for (Index i = 0; i < positions; ++i) {
    for (Index c = begin; c < end; c += kLanes<T>) store_up_to(x + i * ld + c, Vec<T>{}, end - c);
  }
}

}  // namespace

template <typename T>
void max_pool_forward(const PoolGeometry& geometry, Index images, Index ld, const T* x, T* y,
                      std::int32_t* argmax, Share share) {
  const Index inputs = Index{geometry.height} * geometry.width;
  const Index outputs = Index{geometry.out_height} * geometry.out_width;
  const PoolWindow* windows = geometry.windows.data();
  for_channels<T>(images, ld, share, [&](Index image, Index begin, Index end) {
    const T* in = x + image * inputs * ld;
    for (Index out = 0; out < outputs; ++out) {
      const PoolWindow& window = windows[out];
      const Index first = Index{window.h0} * geometry.width + window.w0;
      for (Index c = begin; c < end; c += kLanes<T>) {
        const Index left = end - c;
        Vec<T> best = load_up_to(in + first * ld + c, left);
        MaskVec<T> where = all_lanes<T>(first);
        for_window(geometry, window, [&](Index position) {
          const Vec<T> value = load_up_to(in + position * ld + c, left);
          const MaskVec<T> better = (value > best) | (value != value);
          best = select<T>(better, value, best);
          where = better ? all_lanes<T>(position) : where;
        });
        const Index at = (image * outputs + out) * ld + c;
        store_up_to(y + at, best, left);
        store_positions<T>(argmax + at, where, left);
      }
    }
  });
}

template <typename T>
void max_pool_backward(const PoolGeometry& geometry, Index images, Index ld,
                       const std::int32_t* argmax, const T* gy, T* gx, bool accumulate,
                       Share share) {
  const Index inputs = Index{geometry.height} * geometry.width;
  const Index outputs = Index{geometry.out_height} * geometry.out_width;
  const PoolWindow* windows = geometry.windows.data();
  for_channels<T>(images, ld, share, [&](Index image, Index begin, Index end) {
    T* in = gx + image * inputs * ld;
    if (!accumulate) clear_channels(in, inputs, ld, begin, end);
    for (Index out = 0; out < outputs; ++out) {
      for (Index c = begin; c < end; c += kLanes<T>) {
        const Index left = end - c, at = (image * outputs + out) * ld + c;
        const MaskVec<T> where = load_positions<T>(argmax + at, left);
        const Vec<T> g = load_up_to(gy + at, left);
        for_window(geometry, windows[out], [&](Index position) {
          T* target = in + position * ld + c;
          const Vec<T> mine = select<T>(where == all_lanes<T>(position), g, Vec<T>{});
          store_up_to(target, load_up_to(target, left) + mine, left);
        });
      }
    }
  });
}

template <typename T>
void max_pool_tangent(const PoolGeometry& geometry, Index images, Index ld,
                      const std::int32_t* argmax, const T* dx, T* dy, Share share) {
  const Index inputs = Index{geometry.height} * geometry.width;
  const Index outputs = Index{geometry.out_height} * geometry.out_width;
  const PoolWindow* windows = geometry.windows.data();
  for_channels<T>(images, ld, share, [&](Index image, Index begin, Index end) {
    const T* in = dx + image * inputs * ld;
    for (Index out = 0; out < outputs; ++out) {
      for (Index c = begin; c < end; c += kLanes<T>) {
        const Index left = end - c, at = (image * outputs + out) * ld + c;
        const MaskVec<T> where = load_positions<T>(argmax + at, left);
        Vec<T> value = {};
        for_window(geometry, windows[out], [&](Index position) {
          const Vec<T> d = load_up_to(in + position * ld + c, left);
          value = select<T>(where == all_lanes<T>(position), d, value);
        });
        store_up_to(dy + at, value, left);
      }
    }
  });
}

template <typename T>
void avg_pool_forward(const PoolGeometry& geometry, Index images, Index ld, Index ldx, const T* x,
                      T* y, Share share) {
  const Index inputs = Index{geometry.height} * geometry.width;
  const Index outputs = Index{geometry.out_height} * geometry.out_width;
  const PoolWindow* windows = geometry.windows.data();
  for_channels<T>(images, ld, share, [&](Index image, Index begin, Index end) {
    const T* in = x + image * inputs * ldx;
    for (Index out = 0; out < outputs; ++out) {
      const Vec<T> scale = broadcast(static_cast<T>(windows[out].scale));
      for (Index c = begin; c < end; c += kLanes<T>) {
        const Index present = larger(smaller(end, ldx) - c, 0);  // an unpadded input has fewer
        Vec<T> sum = {};
        for_window(geometry, windows[out], [&](Index position) {
          if (present > 0) sum += load_up_to(in + position * ldx + c, present);
        });
        store_up_to(y + (image * outputs + out) * ld + c, sum * scale, end - c);
      }
    }
  });
}

template <typename T>
void avg_pool_backward(const PoolGeometry& geometry, Index images, Index ld, const T* gy, T* gx,
                       bool accumulate, Share share) {
  const Index inputs = Index{geometry.height} * geometry.width;
  const Index outputs = Index{geometry.out_height} * geometry.out_width;
  const PoolWindow* windows = geometry.windows.data();
  for_channels<T>(images, ld, share, [&](Index image, Index begin, Index end) {
    T* in = gx + image * inputs * ld;
    if (!accumulate) clear_channels(in, inputs, ld, begin, end);
    for (Index out = 0; out < outputs; ++out) {
      const Vec<T> scale = broadcast(static_cast<T>(windows[out].scale));
      for (Index c = begin; c < end; c += kLanes<T>) {
        const Index left = end - c;
        const Vec<T> g = load_up_to(gy + (image * outputs + out) * ld + c, left) * scale;
        for_window(geometry, windows[out], [&](Index position) {
          T* target = in + position * ld + c;
          store_up_to(target, load_up_to(target, left) + g, left);
        });
      }
    }
  });
}

#define FASTMAML_INSTANTIATE(T)                                                              \
  template void max_pool_forward<T>(const PoolGeometry&, Index, Index, const T*, T*,         \
                                    std::int32_t*, Share);                                   \
  template void max_pool_backward<T>(const PoolGeometry&, Index, Index, const std::int32_t*, \
                                     const T*, T*, bool, Share);                             \
  template void max_pool_tangent<T>(const PoolGeometry&, Index, Index, const std::int32_t*,  \
                                    const T*, T*, Share);                                    \
  template void avg_pool_forward<T>(const PoolGeometry&, Index, Index, Index, const T*, T*,  \
                                    Share);                                                  \
  template void avg_pool_backward<T>(const PoolGeometry&, Index, Index, const T*, T*, bool, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
