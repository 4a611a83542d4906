#include "cpu/program_layout.h"

#include <limits>
#include <stdexcept>

#include "cpu/kernels.h"

namespace fastmaml {

Index element_count(const Shape& shape) {
  Index count = 1;
  for (Index size : shape) count *= size;
  return count;
}

std::string to_string(const Shape& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return text + "]";
}

Layout dense_layout(const Shape& shape) {
  Layout layout;
  layout.channels = layout.ld = element_count(shape);
  layout.offsets.resize(layout.ld);
  for (Index i = 0; i < layout.ld; ++i) layout.offsets[i] = static_cast<std::int32_t>(i);
  return layout;
}

Layout channel_layout(const Shape& shape, const std::vector<bool>& channel_axes, int lanes) {
  Layout layout;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    (channel_axes[axis] ? layout.channels : layout.positions) *= shape[axis];
  }
  layout.ld = padded(layout.channels, lanes);
  if (layout.size() > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("a value of shape " + to_string(shape) +
                                " is too large: an example must have fewer than 2^31 elements");
  }
  std::vector<Index> strides(shape.size());
  Index channel_stride = 1;
  Index position_stride = layout.ld;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    Index& stride = channel_axes[axis] ? channel_stride : position_stride;
    strides[axis] = stride;
    stride *= shape[axis];
  }
  layout.offsets.resize(element_count(shape));
  std::vector<Index> index(shape.size(), 0);
  Index offset = 0;
  for (std::int32_t& out : layout.offsets) {
    out = static_cast<std::int32_t>(offset);
    for (std::size_t axis = shape.size(); axis-- > 0;) {
      offset += strides[axis];
      if (++index[axis] < shape[axis]) break;
      offset -= strides[axis] * shape[axis];
      index[axis] = 0;
    }
  }
  return layout;
}

Layout channels_first(const Shape& shape, int lanes) {
  std::vector<bool> axes(shape.size(), false);
  if (!axes.empty()) axes.front() = true;
  return channel_layout(shape, axes, lanes);
}

Layout channels_last(const Shape& shape, int lanes) {
  std::vector<bool> axes(shape.size(), false);
  if (!axes.empty()) axes.back() = true;
  return channel_layout(shape, axes, lanes);
}

Layout usual_layout(const Shape& shape, int lanes) {
  return shape.size() == 3 ? channels_first(shape, lanes) : channels_last(shape, lanes);
}

Layout with_ld(const Layout& layout, Index ld) {
  Layout result = layout;
  result.ld = ld;
  for (std::int32_t& offset : result.offsets) {
    offset = static_cast<std::int32_t>(offset / layout.ld * ld + offset % layout.ld);
  }
  return result;
}

Layout narrowed(const Layout& layout, const Shape& shape, Index axis, Index start, Index length) {
  Index inner = 1;
  for (std::size_t i = axis + 1; i < shape.size(); ++i) inner *= shape[i];
  const Index block = shape[axis] * inner;
  Layout result = layout;
  result.offsets.clear();
  const Index count = static_cast<Index>(layout.offsets.size());
  for (Index first = start * inner; first < count; first += block) {
    const auto from = layout.offsets.begin() + first;
    result.offsets.insert(result.offsets.end(), from, from + length * inner);
  }
  return result;
}

Layout permuted(const Layout& layout, const Shape& shape, const std::vector<Index>& dims) {
  std::vector<Index> strides(shape.size());
  Index stride = 1;
  for (std::size_t axis = shape.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= shape[axis];
  }
  Layout result = layout;
  std::vector<Index> index(dims.size(), 0);
  Index source = 0;
  for (std::int32_t& out : result.offsets) {
    out = layout.offsets[source];
    for (std::size_t axis = dims.size(); axis-- > 0;) {
      const Index from = dims[axis];
      source += strides[from];
      if (++index[axis] < shape[from]) break;
      source -= strides[from] * shape[from];
      index[axis] = 0;
    }
  }
  return result;
}

namespace {

// The first elements from `at` on that are equally far apart, or none, and the gap that follows.
Stretch stretch_at(const std::vector<std::int32_t>& map, std::size_t at) {
  const auto holds = [&](std::size_t i) { return i < map.size() && map[i] >= 0; };
  const std::int32_t apart = holds(at) && holds(at + 1) ? map[at + 1] - map[at] : 1;
  std::size_t end = at + (holds(at) ? 1 : 0);
  while (end > at && holds(end) && map[end] - map[end - 1] == apart) ++end;
  std::size_t next = end;
  while (next < map.size() && !holds(next)) ++next;
  const auto narrow = [](std::size_t value) { return static_cast<std::int32_t>(value); };
  return {narrow(at), narrow(end - at), narrow(next - end), holds(at) ? map[at] : 0, apart};
}

}  // namespace

Rearrangement rearrangement(const std::vector<std::int32_t>& map, Index from_size) {
  Rearrangement result;
  result.from_size = from_size;
  result.to_size = static_cast<Index>(map.size());
  for (std::size_t at = 0; at < map.size();) {
    const Stretch stretch = stretch_at(map, at);
    result.stretches.push_back(stretch);
    at += static_cast<std::size_t>(stretch.count) + static_cast<std::size_t>(stretch.gap);
  }
  return result;
}

Rearrangement rearrangement(const Layout& from, const Layout& to) {
  std::vector<std::int32_t> map(to.size(), -1);
  for (std::size_t i = 0; i < from.offsets.size(); ++i) map[to.offsets[i]] = from.offsets[i];
  return rearrangement(map, from.size());
}

}  // namespace fastmaml
