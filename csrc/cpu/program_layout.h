// Where the elements of one example of a value lie in memory.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "fastmaml/core.h"

namespace fastmaml {

// Rows of channels: [positions][ld], of which `channels` are used. offsets[i] is the place of the
// element with row-major torch index i. Reshaping leaves a layout as it is and a permutation only
// reorders its offsets, so neither moves data until an op demands another layout.
struct Layout {
  Index positions = 1;
  Index channels = 1;
  Index ld = 1;
  std::vector<std::int32_t> offsets;

  Index size() const { return positions * ld; }
  bool same_as(const Layout& other) const {
    return ld == other.ld && positions == other.positions && offsets == other.offsets;
  }
};

Index element_count(const Shape& shape);
std::string to_string(const Shape& shape);

// Torch's own order, without padding.
Layout dense_layout(const Shape& shape);

// The axes marked in `channel_axes` become channels, the others positions; ld = padded channels.
Layout channel_layout(const Shape& shape, const std::vector<bool>& channel_axes, int lanes);
Layout channels_first(const Shape& shape, int lanes);  // (C, ...), as convolutions want
Layout channels_last(const Shape& shape, int lanes);   // (..., C), as linear layers want

// What most readers of such a value want.
Layout usual_layout(const Shape& shape, int lanes);

Layout with_ld(const Layout& layout, Index ld);
// Only the elements at `length` places of `axis`, from `start` on.
Layout narrowed(const Layout& layout, const Shape& shape, Index axis, Index start, Index length);
Layout permuted(const Layout& layout, const Shape& shape, const std::vector<Index>& dims);

// What turns `from` into `to`: gaps are `to`'s padding.
Rearrangement rearrangement(const Layout& from, const Layout& to);
// By place where it comes to, the place where an element comes from; negative: none does.
Rearrangement rearrangement(const std::vector<std::int32_t>& map, Index from_size);

}  // namespace fastmaml
