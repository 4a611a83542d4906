#include "shape.h"

#include <utility>

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// Two rows swap what lies off the diagonal of their 2 x 2 blocks of `W` lanes.
template <typename T, int W, int... J>
FASTMAML_INLINE void swap_blocks(Vec<T>* upper, Vec<T>* lower, std::integer_sequence<int, J...>) {
  const Vec<T> a = *upper, b = *lower;
  *upper = shuffle<T, (J & W ? kLanes<T> + J - W : J)...>(a, b);
  *lower = shuffle<T, (J & W ? kLanes<T> + J : J + W)...>(a, b);
}

template <typename T, int W>
FASTMAML_INLINE void transpose_square(Vec<T> (&rows)[kLanes<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & W) continue;
    swap_blocks<T, W>(&rows[i], &rows[i + W], std::make_integer_sequence<int, kLanes<T>>());
  }
  if constexpr (W > 1) transpose_square<T, W / 2>(rows);
}

// One square of kLanes x kLanes, of which `rows` x `columns` exist in the source.
template <typename T>
FASTMAML_INLINE void transpose_block(const T* in, Index ld_in, Index rows, Index columns, T* out,
                                     Index ld_out) {
  Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) square[i] = i < rows ? load(in + i * ld_in) : Vec<T>{};
  transpose_square<T, kLanes<T> / 2>(square);
#pragma GCC unroll 16
  for (int j = 0; j < kLanes<T>; ++j) {
    if (j < columns) store(out + j * ld_out, square[j]);
  }
}

// What of a stretch goes to a part of all places.
FASTMAML_INLINE Stretch clipped(const Stretch& s, Range part) {
  const Index first = larger(s.to, part.begin), end = s.to + s.count;
  const Index last = larger(first, smaller(end, part.end));
  const Index gap = smaller(end + s.gap, part.end) - larger(end, part.begin);
  const auto narrow = [](Index value) { return static_cast<std::int32_t>(value); };
  return {narrow(first), narrow(last - first), narrow(larger(gap, 0)),
          narrow(s.from + (first - s.to) * s.apart), s.apart};
}

// Neighbours stay neighbours. What is less than a vector is a whole one with zeros behind, where
// there is a gap: stores of parts of a vector are slow.
template <typename T, Moving kHow>
FASTMAML_INLINE void move_neighbours(const Stretch& s, const T* from, T* to) {
  const Index room = kHow == Moving::kWriteLeavingGaps ? s.count : s.count + s.gap;
  Index j = 0;
  for (; j < s.count; j += kLanes<T>) {
    const Index to_store = room - j;
    Vec<T> value = load_up_to(from + j, s.count - j);
    if (kHow == Moving::kAdd) value += load_up_to(to + j, to_store);
    store_up_to(to + j, value, to_store);
  }
  if (kHow != Moving::kWrite) return;
  for (; j < room; j += kLanes<T>) store_up_to(to + j, Vec<T>{}, room - j);
}

template <typename T, Moving kHow>
FASTMAML_INLINE void move(const Stretch& s, const T* from, T* to) {
  if (s.apart == 1) return move_neighbours<T, kHow>(s, from, to);
  for (Index j = 0; j < s.count; ++j, from += s.apart) {
    to[j] = kHow == Moving::kAdd ? to[j] + *from : *from;
  }
  if (kHow != Moving::kWrite) return;
  for (Index j = s.count; j < s.count + s.gap; ++j) to[j] = 0;
}

template <typename T, Moving kHow>
void rearrange_examples(Index examples, const Rearrangement& arranged, const T* in, T* out,
                        Share share) {
  const Index size = arranged.to_size;
  const Range mine = split(examples * size, share);
  for (Index at = mine.begin; at < mine.end;) {
    const Index example = at / size, start = example * size;
    const Range part{at - start, smaller(mine.end - start, size)};
    const bool whole = part.end - part.begin == size;
    const T* source = in + example * arranged.from_size;
    for (const Stretch& s : arranged.stretches) {
      const Stretch stretch = whole ? s : clipped(s, part);
      if (stretch.count + stretch.gap == 0) continue;
      move<T, kHow>(stretch, source + stretch.from, out + start + stretch.to);
    }
    at = start + part.end;
  }
}

}  // namespace

template <typename T>
void transpose(Index taps, Index k, Index n, const T* in, T* out, Share share) {
  const Index ld_in = padded_to_lanes<T>(n), ld_out = padded_to_lanes<T>(k);
  const Index blocks_k = ld_out / kLanes<T>, blocks_n = ld_in / kLanes<T>;
  const Range mine = split(taps * blocks_k * blocks_n, share);
  for (Index unit = mine.begin; unit < mine.end; ++unit) {
    const Index tap = unit / (blocks_k * blocks_n), rest = unit % (blocks_k * blocks_n);
    const Index row = rest / blocks_n * kLanes<T>, column = rest % blocks_n * kLanes<T>;
    transpose_block(in + (tap * k + row) * ld_in + column, ld_in, smaller(k - row, kLanes<T>),
                    smaller(n - column, kLanes<T>), out + (tap * n + column) * ld_out + row,
                    ld_out);
  }
}

template <typename T>
void rearrange(Index examples, const Rearrangement& arranged, const T* in, T* out, Moving how,
               Share share) {
  switch (how) {
    case Moving::kWrite:
      return rearrange_examples<T, Moving::kWrite>(examples, arranged, in, out, share);
    case Moving::kWriteLeavingGaps:
      return rearrange_examples<T, Moving::kWriteLeavingGaps>(examples, arranged, in, out, share);
    case Moving::kAdd:
      return rearrange_examples<T, Moving::kAdd>(examples, arranged, in, out, share);
  }
}

template <typename T>
void gather_sums(Index examples, Index in_size, Index out_size, const std::int32_t* starts,
                 const std::int32_t* places, const T* in, T* out, bool accumulate, Share share) {
  const Range mine = split(examples * out_size, share);
  for (Index row = mine.begin; row < mine.end;) {
    const Index example = row / out_size, start = example * out_size;
    const Index end = smaller(mine.end, start + out_size);
    const T* source = in + example * in_size;
    for (; row < end; ++row) {
      const Index i = row - start;
      T sum = accumulate ? out[row] : T(0);
      for (Index k = starts[i]; k < starts[i + 1]; ++k) sum += source[places[k]];
      out[row] = sum;
    }
  }
}

template <typename T>
void axpby(Index count, T a, const T* x, T b, const T* y, T* out, bool accumulate, Share share) {
  const Range mine = split_elements<T>(count, share);
  const Vec<T> va = broadcast(a), vb = broadcast(b);
  for (Index i = mine.begin; i < mine.end; i += kLanes<T>) {
    const Index left = mine.end - i;
    Vec<T> value = va * load_up_to(x + i, left);
    if (y) value = fma(vb, load_up_to(y + i, left), value);
    if (accumulate) value += load_up_to(out + i, left);
    store_up_to(out + i, value, left);
  }
}

template <typename T>
void update(Index count, T a, const T* rate, const T* x, const T* g, T* out, Share share) {
  const Range mine = split_elements<T>(count, share);
  const Vec<T> va = broadcast(a);
  for (Index i = mine.begin; i < mine.end; i += kLanes<T>) {
    const Index left = mine.end - i;
    Vec<T> step = load_up_to(g + i, left);
    if (rate) step *= load_up_to(rate + i, left);
    store_up_to(out + i, fma(va, step, load_up_to(x + i, left)), left);
  }
}

#define FASTMAML_INSTANTIATE(T)                                                               \
  template void transpose<T>(Index, Index, Index, const T*, T*, Share);                       \
  template void rearrange<T>(Index, const Rearrangement&, const T*, T*, Moving, Share);       \
  template void gather_sums<T>(Index, Index, Index, const std::int32_t*, const std::int32_t*, \
                               const T*, T*, bool, Share);                                    \
  template void axpby<T>(Index, T, const T*, T, const T*, T*, bool, Share);                   \
  template void update<T>(Index, T, const T*, const T*, const T*, T*, Share);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
