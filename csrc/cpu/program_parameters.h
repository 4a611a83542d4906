// Parameters as the kernels want them: weights [taps][in][padded(out)], vectors padded with zeros.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "fastmaml/core.h"

namespace fastmaml {

// What a derivative may be taken with respect to; sets are unions of these bits.
using Sources = unsigned;
constexpr Sources kTheta = 1;
constexpr Sources kPhi = 2;
constexpr Sources kInput = 4;

struct PackedSlot {
  bool adapted = true;
  bool swapped = false;  // in torch's layout, see SlotSpec
  Index offset = 0;      // in theta or phi, torch layout
  Index taps = 1, in = 1, out = 1;
  Index packed = 0;            // offset in the packed group
  Index packed_size = 0;       // padding included
  Index transposed = -1;       // offset in the group's transposed weights
  Sources transposed_for = 0;  // the transpose is read when one of these is differentiated

  Index size() const { return taps * in * out; }
  Sources source() const { return adapted ? kTheta : kPhi; }
};

// Packed values of both groups with their transposes; null where a group is absent (zero).
template <typename T>
struct Weights {
  const T* theta = nullptr;
  const T* theta_transposed = nullptr;
  const T* phi = nullptr;
  const T* phi_transposed = nullptr;

  const T* value(const PackedSlot& slot) const {
    const T* group = slot.adapted ? theta : phi;
    return group == nullptr ? nullptr : group + slot.packed;
  }
  const T* transposed(const PackedSlot& slot) const {
    const T* group = slot.adapted ? theta_transposed : phi_transposed;
    return group == nullptr ? nullptr : group + slot.transposed;
  }
};

// One of the two groups, theta (adapted) or phi.
class ParameterGroup {
 public:
  // `size`: elements in torch's layout, of which the slots may cover a part; -1: just what they
  // cover.
  void build(std::vector<PackedSlot>& slots, bool adapted, Index size, int lanes);

  Index size() const { return size_; }
  Index packed_size() const { return packed_size_; }
  Index transposed_size() const { return transposed_size_; }

  // Torch's layout to packed: every element is written, padding as zero.
  template <typename T>
  void pack(const T* flat, T* packed, Share share) const;
  // Packed to torch's layout, times `scale`; what no slot covers is zero.
  template <typename T>
  void unpack(const T* packed, T scale, T* flat, Share share) const;
  // Rows as the four operations may exchange them with the caller: packed, then what no slot
  // covers.
  Index row_size() const { return packed_size_ + uncovered_; }
  template <typename T>
  void pack_row(const T* flat, T* row, Share share) const;
  template <typename T>
  void unpack_row(const T* row, T* flat, Share share) const;
  // Zero what lies between slots, which no kernel writes.
  template <typename T>
  void clear_gaps(T* packed) const;
  // The same in a row, and what no slot covers.
  template <typename T>
  void clear_unused(T* row) const;
  // Equal for programs whose rows are alike.
  std::vector<Index> packing() const;
  // Copies what no slot covers.
  template <typename T>
  void copy_uncovered(const T* from, T* to) const;
  // The transposes that differentiating `sources` reads, but for the slots at some offsets.
  template <typename T>
  void transpose(const Kernels<T>& kernels, const T* packed, Sources sources, T* transposed,
                 Share share, const std::vector<Index>& left_out = {}) const;

 private:
  void find_gaps();

  std::vector<PackedSlot> slots_;
  int lanes_ = 1;
  Index size_ = 0;
  std::vector<Range> gaps_;  // what no slot covers
  Index uncovered_ = 0;      // elements in the gaps
  Index packed_size_ = 0;
  Index transposed_size_ = 0;
};

}  // namespace fastmaml
