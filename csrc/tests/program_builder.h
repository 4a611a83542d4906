// Builds small program specs for tests.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cpu/program_layout.h"
#include "fastmaml/core.h"

namespace fastmaml_test {

using fastmaml::Attribute;
using fastmaml::element_count;
using fastmaml::Index;
using fastmaml::OpSpec;
using fastmaml::ProgramSpec;
using fastmaml::Shape;
using Attributes = std::map<std::string, Attribute>;

class ProgramBuilder {
 public:
  explicit ProgramBuilder(Shape input, fastmaml::DType dtype = fastmaml::DType::kFloat64) {
    spec_.dtype = dtype;
    spec_.values.push_back(std::move(input));
  }

  const ProgramSpec& spec() const { return spec_; }
  const Shape& shape(int value) const { return spec_.values[value]; }
  // Parameters made from now on are part of phi, or of theta again.
  void adapt(bool adapted) { adapted_ = adapted; }

  int slot(Shape shape) {
    Index& end = adapted_ ? theta_end_ : phi_end_;
    spec_.slots.push_back({shape, adapted_, end});
    end += element_count(shape);
    return static_cast<int>(spec_.slots.size()) - 1;
  }

  int buffer(Shape shape) {
    spec_.buffers.push_back(std::move(shape));
    return static_cast<int>(spec_.buffers.size()) - 1;
  }

  int op(const std::string& kind, std::vector<int> inputs, Shape output, std::vector<int> params,
         Attributes attributes, std::vector<int> buffers = {}) {
    OpSpec op;
    op.kind = kind;
    op.inputs = std::move(inputs);
    op.params = std::move(params);
    op.buffers = std::move(buffers);
    op.attributes = std::move(attributes);
    op.output = spec_.output = static_cast<int>(spec_.values.size());
    spec_.values.push_back(std::move(output));
    spec_.ops.push_back(std::move(op));
    return spec_.output;
  }

  int linear(int x, Index out) {
    Shape output = shape(x);
    output.back() = out;
    const int weight = slot({out, shape(x).back()});
    return op("linear", {x}, output, {weight, slot({out})}, {});
  }

  // The weight of the layer that was made last lies as its transpose does.
  int swapped(int y) {
    spec_.slots[spec_.ops.back().params[0]].swapped = true;
    return y;
  }

  int conv2d(int x, Index out, Index kernel = 3, Index stride = 1, Index padding = 1,
             Index dilation = 1, bool bias = true) {
    const auto extent = [&](int axis) {
      return (shape(x)[axis] + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
    };
    const int weight = slot({out, shape(x)[0], kernel, kernel});
    return op("conv2d", {x}, {out, extent(1), extent(2)}, {weight, bias ? slot({out}) : -1},
              {{"stride", pair(stride)}, {"padding", pair(padding)}, {"dilation", pair(dilation)}});
  }

  int batch_norm(int x, bool training = true, bool affine = true) {
    const Shape channels = {shape(x)[0]};
    std::vector<int> params = {-1, -1};
    std::vector<int> buffers = {-1, -1};
    if (affine) params = {slot(channels), slot(channels)};
    if (!training) buffers = {buffer(channels), buffer(channels)};
    return op("batch_norm", {x}, shape(x), params,
              {{"training", training}, {"tracking", training}, {"eps", 1e-5}}, buffers);
  }

  // Over `channels`, one axis after the other; in front of them are sets, behind them positions.
  int group_norm(int x, Index groups, std::vector<Index> channels, bool affine = true) {
    Shape vector = {1};
    for (Index axis : channels) vector[0] *= shape(x)[axis];
    std::vector<int> params = {-1, -1};
    if (affine) params = {slot(vector), slot(vector)};
    return op("group_norm", {x}, shape(x), params,
              {{"groups", groups}, {"channels", std::move(channels)}, {"eps", 1e-5}});
  }

  int activation(int x, const std::string& function) {
    const std::map<std::string, std::pair<double, double>> constants = {
        {"elu", {1, 1}}, {"softplus", {1, 20}}, {"hardtanh", {0, 1e30}}};
    const auto found = constants.find(function);
    const auto [alpha, beta] = found == constants.end() ? std::pair(0.0, 0.0) : found->second;
    return op("activation", {x}, shape(x), {},
              {{"function", function}, {"alpha", alpha}, {"beta", beta}});
  }

  int max_pool2d(int x, Index kernel, Index stride, Index padding, Shape output) {
    return op("max_pool2d", {x}, std::move(output), {},
              {{"kernel", pair(kernel)},
               {"stride", pair(stride)},
               {"padding", pair(padding)},
               {"dilation", pair(1)},
               {"ceil_mode", false}});
  }

  int avg_pool2d(int x, Index kernel, Index stride, Index padding, bool include_padding,
                 Shape output) {
    return op("avg_pool2d", {x}, std::move(output), {},
              {{"kernel", pair(kernel)},
               {"stride", pair(stride)},
               {"padding", pair(padding)},
               {"ceil_mode", true},
               {"count_include_pad", include_padding}});
  }

  int adaptive_avg_pool2d(int x, Index height, Index width) {
    return op("adaptive_avg_pool2d", {x}, {shape(x)[0], height, width}, {}, {});
  }

  int mean(int x, std::vector<Index> dims) {
    Shape output;
    for (Index axis = 0; axis < static_cast<Index>(shape(x).size()); ++axis) {
      bool kept = true;
      for (Index dim : dims) kept = kept && dim != axis;
      if (kept) output.push_back(shape(x)[axis]);
    }
    return op("mean", {x}, output, {}, {{"dims", std::move(dims)}, {"keepdim", false}});
  }

  int view(int x, Shape output) { return op("view", {x}, std::move(output), {}, {}); }
  int flatten(int x) { return view(x, {element_count(shape(x))}); }

  int permute(int x, std::vector<Index> dims) {
    Shape output;
    for (Index dim : dims) output.push_back(shape(x)[dim]);
    return op("permute", {x}, output, {}, {{"dims", std::move(dims)}});
  }

  int add(int a, int b, double alpha) {
    return op("add", {a, b}, shape(a), {}, {{"alpha", alpha}});
  }
  int mul(int a, int b) { return op("mul", {a, b}, shape(a), {}, {}); }
  int take(int x, Shape output, std::vector<Index> places) {
    return op("take", {x}, std::move(output), {}, {{"places", std::move(places)}});
  }
  int masked_fill(int x, int mask, double value) {
    return op("masked_fill", {x, mask}, shape(x), {}, {{"value", value}});
  }
  int detach(int x) { return op("detach", {x}, shape(x), {}, {}); }
  int bmm(int a, int b) {
    Shape output = shape(a);
    output.back() = shape(b).back();
    return op("bmm", {a, b}, output, {}, {});
  }
  int softmax(int x, Index dim, bool log = false) {
    return op("softmax", {x}, shape(x), {}, {{"dim", dim}, {"log", log}, {"safe", false}});
  }
  int embedding(int numbers, Index rows, Index width) {
    Shape output = shape(numbers);
    output.push_back(width);
    return op("embedding", {numbers}, output, {slot({rows * width})},
              {{"rows", rows}, {"padding", Index{-1}}});
  }
  int cat(std::vector<int> parts, Index axis) {
    Shape output = shape(parts[0]);
    for (std::size_t i = 1; i < parts.size(); ++i) output[axis] += shape(parts[i])[axis];
    return op("cat", std::move(parts), output, {}, {{"dim", axis}});
  }
  int narrow(int x, Index axis, Index start, Index length) {
    Shape output = shape(x);
    output[axis] = length;
    return op("narrow", {x}, output, {}, {{"dim", axis}, {"start", start}});
  }
  int expand(int x, Shape output) { return op("expand", {x}, std::move(output), {}, {}); }
  int scale(int x, double alpha, double beta) {
    return op("scale", {x}, shape(x), {}, {{"alpha", alpha}, {"beta", beta}});
  }

 private:
  static std::vector<Index> pair(Index value) { return {value, value}; }

  ProgramSpec spec_;
  bool adapted_ = true;
  Index theta_end_ = 0, phi_end_ = 0;
};

}  // namespace fastmaml_test
