#include "softmax.h"

#include <limits>

#include "vector_math.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// v in the first `left` lanes, `otherwise` in those behind.
template <typename T>
FASTMAML_INLINE Vec<T> first_lanes(Vec<T> v, Index left, T otherwise) {
  for (Index i = left; i < kLanes<T>; ++i) v[i] = otherwise;
  return v;
}

template <typename T>
FASTMAML_INLINE T lane_max(Vec<T> v) {
  T highest = v[0];
  for (int i = 1; i < kLanes<T>; ++i) highest = v[i] > highest ? v[i] : highest;
  return highest;
}

// Vectors of one row of a value; past its end they read zeros.
template <typename T>
struct RowView {
  Index columns;

  // body(first column, columns left) for each vector.
  template <typename Body>
  FASTMAML_INLINE void each(Body body) const {
    for (Index c = 0; c < columns; c += kLanes<T>) body(c, columns - c);
  }
  template <typename Term>
  FASTMAML_INLINE T sum(Term term) const {
    Vec<T> total = {};
    each([&](Index c, Index left) { total += term(c, left); });
    return lane_sum<T>(total);
  }
  template <typename Value>
  FASTMAML_INLINE void fill(T* out, bool accumulate, Value value) const {
    each([&](Index c, Index left) {
      Vec<T> v = first_lanes<T>(value(c, left), left, T(0));
      if (accumulate) v += load(out + c);
      store(out + c, v);
    });
  }
};

// The softmax whose logarithm, with `log`, is y.
template <typename T>
FASTMAML_INLINE Vec<T> shares(bool log, const T* y, Index left) {
  const Vec<T> v = load_up_to(y, left);
  return log ? first_lanes<T>(vector_exp<T>(v), left, T(0)) : v;
}

// body(row view, offset) for the rows of a share.
template <typename T, typename Body>
FASTMAML_INLINE void for_rows(Index rows, Index columns, Share share, Body body) {
  const Index ld = padded_to_lanes<T>(columns);
  const Range mine = split(rows, share);
  for (Index row = mine.begin; row < mine.end; ++row) body(RowView<T>{columns}, row * ld);
}

}  // namespace

template <typename T>
void softmax_forward(bool log, bool safe, Index rows, Index columns, const T* x, T* y,
                     Share share) {
  for_rows<T>(rows, columns, share, [&](RowView<T> row, Index at) {
    const T lowest = -std::numeric_limits<T>::infinity();
    Vec<T> highest = broadcast(lowest);
    row.each([&](Index c, Index left) {
      const Vec<T> v = first_lanes<T>(load_up_to(x + at + c, left), left, lowest);
      highest = select<T>(v > highest, v, highest);
    });
    const T most = lane_max<T>(highest);
    if (safe && most == lowest) {
      return row.fill(y + at, false, [](Index, Index) { return Vec<T>{}; });
    }
    const Vec<T> shift = broadcast(most);
    const auto exponential = [&](Index c, Index left) {
      return first_lanes<T>(vector_exp<T>(load_up_to(x + at + c, left) - shift), left, T(0));
    };
    if (log) {
      const Vec<T> log_sum = broadcast(scalar_log(row.sum(exponential)));
      return row.fill(y + at, false, [&](Index c, Index left) {
        return load_up_to(x + at + c, left) - shift - log_sum;
      });
    }
    row.fill(y + at, false, exponential);
    const Vec<T> total =
        broadcast(row.sum([&](Index c, Index left) { return load_up_to(y + at + c, left); }));
    row.fill(y + at, false,
             [&](Index c, Index left) { return load_up_to(y + at + c, left) / total; });
  });
}

template <typename T>
void softmax_backward(bool log, Index rows, Index columns, const T* y, const T* gy, T* gx,
                      bool accumulate, Share share) {
  for_rows<T>(rows, columns, share, [&](RowView<T> row, Index at) {
    const auto gradient = [&](Index c, Index left) { return load_up_to(gy + at + c, left); };
    const auto own = [&](Index c, Index left) { return shares(log, y + at + c, left); };
    if (log) {
      const Vec<T> sum = broadcast(row.sum(gradient));
      return row.fill(gx + at, accumulate,
                      [&](Index c, Index left) { return gradient(c, left) - own(c, left) * sum; });
    }
    const Vec<T> mean =
        broadcast(row.sum([&](Index c, Index left) { return own(c, left) * gradient(c, left); }));
    row.fill(gx + at, accumulate,
             [&](Index c, Index left) { return own(c, left) * (gradient(c, left) - mean); });
  });
}

template <typename T>
void softmax_tangent(bool log, Index rows, Index columns, const T* y, const T* dx, T* dy,
                     Share share) {
  for_rows<T>(rows, columns, share, [&](RowView<T> row, Index at) {
    const auto direction = [&](Index c, Index left) { return load_up_to(dx + at + c, left); };
    const auto own = [&](Index c, Index left) { return shares(log, y + at + c, left); };
    const Vec<T> mean =
        broadcast(row.sum([&](Index c, Index left) { return own(c, left) * direction(c, left); }));
    row.fill(dy + at, false, [&](Index c, Index left) {
      const Vec<T> moved = direction(c, left) - mean;
      return log ? moved : own(c, left) * moved;
    });
  });
}

template <typename T>
void softmax_backward_tangent(bool log, Index rows, Index columns, const T* y, const T* dy,
                              const T* gy, const T* dgy, T* dgx, bool accumulate, Share share) {
  for_rows<T>(rows, columns, share, [&](RowView<T> row, Index at) {
    const auto own = [&](Index c, Index left) { return shares(log, y + at + c, left); };
    const auto moved = [&](Index c, Index left) { return load_up_to(dy + at + c, left); };
    const auto first = [&](Index c, Index left) { return load_up_to(gy + at + c, left); };
    const auto second = [&](Index c, Index left) {
      return dgy == nullptr ? Vec<T>{} : load_up_to(dgy + at + c, left);
    };
    if (log) {
      const Vec<T> sum = broadcast(row.sum(first)), dsum = broadcast(row.sum(second));
      return row.fill(dgx + at, accumulate, [&](Index c, Index left) {
        return second(c, left) - own(c, left) * fma(moved(c, left), sum, dsum);
      });
    }
    const Vec<T> mean =
        broadcast(row.sum([&](Index c, Index left) { return own(c, left) * first(c, left); }));
    const Vec<T> dmean = broadcast(row.sum([&](Index c, Index left) {
      return fma(own(c, left), second(c, left), moved(c, left) * first(c, left));
    }));
    row.fill(dgx + at, accumulate, [&](Index c, Index left) {
      return fma(moved(c, left), first(c, left) - mean, own(c, left) * (second(c, left) - dmean));
    });
  });
}

#define FASTMAML_INSTANTIATE(T)                                                               \
  template void softmax_forward<T>(bool, bool, Index, Index, const T*, T*, Share);            \
  template void softmax_backward<T>(bool, Index, Index, const T*, const T*, T*, bool, Share); \
  template void softmax_tangent<T>(bool, Index, Index, const T*, const T*, T*, Share);        \
  template void softmax_backward_tangent<T>(bool, Index, Index, const T*, const T*, const T*, \
                                            const T*, T*, bool, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
