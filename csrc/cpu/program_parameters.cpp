#include "cpu/program_parameters.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fastmaml {

namespace {

constexpr Index kAlignment = 16;  // elements: 64 bytes of float
constexpr Index kTile = 16;

// Tiles keep both sides of a transposition within a few cache lines; a share takes whole tiles of
// rows. body(row range, column range).
template <typename Body>
void for_tiles(Index rows, Index columns, Share share, const Body& body) {
  const Range tiles = split((rows + kTile - 1) / kTile, share);
  for (Index tile = tiles.begin; tile < tiles.end; ++tile) {
    const Range row_range{tile * kTile, std::min(rows, (tile + 1) * kTile)};
    for (Index c = 0; c < columns; c += kTile) {
      body(row_range, Range{c, std::min(columns, c + kTile)});
    }
  }
}

// Torch keeps a weight as [out][in][taps]; column c = (input, tap) becomes row (tap, input).
struct PackedRow {
  Index taps, in, ld;
  Index operator()(Index column) const { return ((column % taps) * in + column / taps) * ld; }
};

PackedRow packed_row(const PackedSlot& slot, int lanes) {
  return {slot.taps, slot.in, padded(slot.out, lanes)};
}

// Where in torch's layout the elements of such a column lie, by outputs.
struct TorchColumn {
  Index begin, step;
  Index operator()(Index out) const { return begin + out * step; }
};

TorchColumn torch_column(const PackedSlot& slot, Index column) {
  if (!slot.swapped) return {column, slot.in * slot.taps};
  const Index input = column / slot.taps, tap = column % slot.taps;
  return {input * slot.out * slot.taps + slot.taps - 1 - tap, slot.taps};
}

}  // namespace

void ParameterGroup::build(std::vector<PackedSlot>& slots, bool adapted, Index size, int lanes) {
  lanes_ = lanes;
  Index end = 0;
  for (PackedSlot& slot : slots) {
    if (slot.adapted != adapted) continue;
    slot.packed = packed_size_;
    slot.packed_size = slot.taps * slot.in * padded(slot.out, lanes);
    packed_size_ += padded(slot.packed_size, kAlignment);
    if (slot.transposed_for != 0) {
      slot.transposed = transposed_size_;
      transposed_size_ += padded(slot.taps * slot.out * padded(slot.in, lanes), kAlignment);
    }
    end = std::max(end, slot.offset + slot.size());
    slots_.push_back(slot);
  }
  size_ = size < 0 ? end : size;
  if (end > size_) {
    throw std::invalid_argument(std::string(adapted ? "theta_size" : "shared_size") +
                                " must be at least " + std::to_string(end) +
                                ", the end of the last slot, got " + std::to_string(size_));
  }
  find_gaps();
}

void ParameterGroup::find_gaps() {
  std::vector<Range> covered;
  for (const PackedSlot& slot : slots_) covered.push_back({slot.offset, slot.offset + slot.size()});
  std::sort(covered.begin(), covered.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  Index end = 0;
  for (const Range& range : covered) {
    if (range.begin < end) {
      throw std::invalid_argument("slots must not overlap: two cover element " +
                                  std::to_string(range.begin));
    }
    if (range.begin > end) gaps_.push_back({end, range.begin});
    end = range.end;
  }
  if (end < size_) gaps_.push_back({end, size_});
  for (const Range& gap : gaps_) uncovered_ += gap.end - gap.begin;
}

template <typename T>
void ParameterGroup::pack(const T* flat, T* packed, Share share) const {
  for (const PackedSlot& slot : slots_) {
    const T* from = flat + slot.offset;
    T* to = packed + slot.packed;
    const PackedRow place = packed_row(slot, lanes_);
    const Index columns = slot.in * slot.taps;
    for_tiles(place.ld, columns, share, [&](Range rows, Range part) {
      const Index end = std::max(rows.begin, std::min(rows.end, slot.out));
      for (Index c = part.begin; c < part.end; ++c) {
        T* row = to + place(c);
        const TorchColumn torch = torch_column(slot, c);
        for (Index r = rows.begin; r < end; ++r) row[r] = from[torch(r)];
        std::fill(row + end, row + rows.end, T(0));
      }
    });
    if (share.part == 0) {
      std::fill(to + slot.packed_size, to + padded(slot.packed_size, kAlignment), T(0));
    }
  }
}

template <typename T>
void ParameterGroup::unpack(const T* packed, T scale, T* flat, Share share) const {
  if (share.part == 0) {
    for (const Range& gap : gaps_) std::fill(flat + gap.begin, flat + gap.end, T(0));
  }
  for (const PackedSlot& slot : slots_) {
    const T* from = packed + slot.packed;
    T* to = flat + slot.offset;
    const PackedRow place = packed_row(slot, lanes_);
    const Index columns = slot.in * slot.taps;
    for_tiles(slot.out, columns, share, [&](Range rows, Range part) {
      for (Index c = part.begin; c < part.end; ++c) {
        const T* row = from + place(c);
        const TorchColumn torch = torch_column(slot, c);
        for (Index r = rows.begin; r < rows.end; ++r) to[torch(r)] = scale * row[r];
      }
    });
  }
}

template <typename T>
void ParameterGroup::pack_row(const T* flat, T* row, Share share) const {
  pack(flat, row, share);
  if (share.part != 0) return;
  T* rest = row + packed_size_;
  for (const Range& gap : gaps_) rest = std::copy(flat + gap.begin, flat + gap.end, rest);
}

template <typename T>
void ParameterGroup::unpack_row(const T* row, T* flat, Share share) const {
  unpack(row, T(1), flat, share);
  if (share.part != 0) return;
  const T* rest = row + packed_size_;
  for (const Range& gap : gaps_) {
    std::copy(rest, rest + (gap.end - gap.begin), flat + gap.begin);
    rest += gap.end - gap.begin;
  }
}

template <typename T>
void ParameterGroup::clear_gaps(T* packed) const {
  for (const PackedSlot& slot : slots_) {
    T* to = packed + slot.packed;
    std::fill(to + slot.packed_size, to + padded(slot.packed_size, kAlignment), T(0));
  }
}

template <typename T>
void ParameterGroup::clear_unused(T* row) const {
  clear_gaps(row);
  std::fill(row + packed_size_, row + row_size(), T(0));
}

std::vector<Index> ParameterGroup::packing() const {
  std::vector<Index> facts{lanes_, size_};
  for (const PackedSlot& slot : slots_) {
    facts.insert(facts.end(), {slot.offset, slot.taps, slot.in, slot.out, slot.swapped});
  }
  return facts;
}

template <typename T>
void ParameterGroup::copy_uncovered(const T* from, T* to) const {
  for (const Range& gap : gaps_) std::copy(from + gap.begin, from + gap.end, to + gap.begin);
}

template <typename T>
void ParameterGroup::transpose(const Kernels<T>& kernels, const T* packed, Sources sources,
                               T* transposed, Share share,
                               const std::vector<Index>& left_out) const {
  for (const PackedSlot& slot : slots_) {
    if ((slot.transposed_for & sources) == 0) continue;
    if (std::find(left_out.begin(), left_out.end(), slot.packed) != left_out.end()) continue;
    kernels.transpose(slot.taps, slot.in, slot.out, packed + slot.packed,
                      transposed + slot.transposed, share);
  }
}

#define FASTMAML_INSTANTIATE(T)                                                               \
  template void ParameterGroup::pack<T>(const T*, T*, Share) const;                           \
  template void ParameterGroup::unpack<T>(const T*, T, T*, Share) const;                      \
  template void ParameterGroup::pack_row<T>(const T*, T*, Share) const;                       \
  template void ParameterGroup::unpack_row<T>(const T*, T*, Share) const;                     \
  template void ParameterGroup::clear_gaps<T>(T*) const;                                      \
  template void ParameterGroup::clear_unused<T>(T*) const;                                    \
  template void ParameterGroup::copy_uncovered<T>(const T*, T*) const;                        \
  template void ParameterGroup::transpose<T>(const Kernels<T>&, const T*, Sources, T*, Share, \
                                             const std::vector<Index>&) const;
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)
#undef FASTMAML_INSTANTIATE

}  // namespace fastmaml
