// Linear layers and convolutions: ops that multiply their input by a weight. Their tangents are
// sums of two products, which the kernels accumulate in one go.
#include <algorithm>
#include <memory>

#include "cpu/grouped_conv_plan.h"
#include "cpu/program_factors.h"
#include "cpu/program_ops.h"
#include "cpu/program_pairs.h"

namespace fastmaml {

namespace {

template <typename T>
void broadcast_row(Index rows, Index ld, const T* row, T* out, Share share) {
  const Range part = split(rows, share);
  for (Index r = part.begin; r < part.end; ++r) std::copy(row, row + ld, out + r * ld);
}

template <typename T>
void clear_rows(Index rows, Index ld, T* out, Share share) {
  const Range part = split(rows * ld, share);
  std::fill(out + part.begin, out + part.end, T(0));
}

// The four passes in terms of three products, which linear and convolution each define.
template <typename T>
class WeightedOp : public Op<T> {
 public:
  void forward(Run<T>& run) const override {
    product(run, {run.value(input()), run.weight(weight()), nullptr, nullptr}, run.weight(bias()),
            run.value_out(this->output));
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    run.fetch(run.value(input()), input());
    weight_gradient(run, flow, {run.value(input()), gy, nullptr, nullptr});
    bias_gradient(run, flow, gy);
    if (run.wanted(flow, input())) {
      input_gradient(run, {gy, weight_back(run), nullptr, nullptr}, run.into(flow, input()));
    }
  }

  void tangent(Run<T>& run) const override {
    const Pairs<T> pairs(run.tangent(input()), run.weight(weight()), run.value(input()),
                         run.direction(weight()));
    const T* bias_direction = run.direction(bias());
    T* dy = run.tangent_out(this->output);
    if (pairs) {
      product(run, pairs, bias_direction, dy);
    } else {
      broadcast_bias(run, bias_direction, dy);
    }
  }

  void backward_tangent(Run<T>& run) const override {
    const T* gy = run.gradient(this->output);
    const T* dgy = run.arrived(run.second, this->output);
    run.fetch(run.value(input()), input());
    run.fetch(run.tangent(input()), input());
    run.fetch(gy, this->output);
    weight_gradient(run, run.second, {run.value(input()), dgy, run.tangent(input()), gy});
    if (dgy != nullptr) bias_gradient(run, run.second, dgy);
    if (!run.wanted(run.second, input())) return;
    const Pairs<T> pairs(dgy, weight_back(run), gy, direction_back(run));
    if (pairs) input_gradient(run, pairs, run.into(run.second, input()));
  }

 protected:
  virtual Index rows(const Run<T>& run) const = 0;
  virtual void product(Run<T>& run, const Pairs<T>& x_w, const T* bias, T* y) const = 0;
  virtual void weight_product(Run<T>& run, const Pairs<T>& x_gy, Target<T> gw) const = 0;
  virtual void input_gradient(Run<T>& run, const Pairs<T>& gy_wt, Target<T> gx) const = 0;
  // The weight, and its direction, as `input_gradient` takes them.
  virtual const T* weight_back(Run<T>& run) const { return run.transposed(weight()); }
  virtual const T* direction_back(Run<T>& run) const { return run.direction_transposed(weight()); }
  virtual void broadcast_bias(Run<T>& run, const T* row, T* y) const {
    broadcast_row(rows(run), padded(out_channels_, run.kernels.lanes), row, y, run.share);
  }
  virtual void sum_bias(Run<T>& run, const T* gy, Target<T> sums) const {
    run.kernels.column_sums(rows(run), out_channels_, gy, sums.data, sums.accumulate, run.share);
  }

  // Whether the bias belongs to what a batch norm would call a channel.
  void place(OpReader& reader, const Layout& in, const Layout& out, bool bias_per_channel) {
    const Place x = reader.need(0, in, Padding::kOptional);
    ldx_ = x.layout.ld;
    reader.need_transposed(weight(), x.storage);
    place_around(reader, x, out, bias_per_channel);
  }

  void place_around(OpReader& reader, const Place& x, const Layout& out, bool bias_per_channel) {
    this->inputs = {x.storage};
    bias_cancels_ = bias_per_channel && reader.feeds_batch_statistics();
    this->output = reader.produce(out);
  }

  int input() const { return this->inputs[0]; }
  int weight() const { return this->slots[0]; }
  int bias() const { return this->slots[1]; }

  Index out_channels_ = 0;
  Index ldx_ = 0;

 private:
  // The batch norm behind it subtracts the mean, and the bias with it: its gradient is zero.
  bool bias_cancels_ = false;

  void weight_gradient(Run<T>& run, Flow<T>& flow, const Pairs<T>& pairs) const {
    if (run.in_factors(weight())) flow.noted[weight()] = pairs;
    if (!pairs || run.in_factors(weight())) return;
    if (const Target<T> target = run.into_slot(flow, weight())) weight_product(run, pairs, target);
  }

  void bias_gradient(Run<T>& run, Flow<T>& flow, const T* gy) const {
    if (bias_cancels_) return;
    if (const Target<T> target = run.into_slot(flow, bias())) sum_bias(run, gy, target);
  }
};

template <typename T>
class LinearLayerOp final : public WeightedOp<T> {
 public:
  explicit LinearLayerOp(OpReader& reader) {
    const Shape& x = reader.input(0);
    if (x.empty()) reader.fail("input must have at least one dimension, got a scalar");
    in_channels_ = x.back();
    this->out_channels_ = reader.output().empty() ? 0 : reader.output().back();
    Shape expected = x;
    expected.back() = this->out_channels_;
    reader.expect_output(expected);
    this->slots = {reader.parameter(0, "weight", {this->out_channels_, in_channels_}, true),
                   reader.parameter(1, "bias", {this->out_channels_}, false)};
    positions_ = element_count(x) / in_channels_;
    this->place(reader, channels_last(x, reader.lanes()), channels_last(expected, reader.lanes()),
                expected.size() == 1);
  }

  Index multiplications() const override { return positions_ * in_channels_ * this->out_channels_; }

  ProductShape product_shape() const override {
    return {positions_, in_channels_, this->out_channels_, this->ldx_};
  }

  void forward(Run<T>& run) const override {
    WeightedOp<T>::forward(run);
    if (!run.in_factors(this->weight())) return;
    add_product(run, product_shape(), moved(run), run.value(this->input()),
                run.value_out(this->output));
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    WeightedOp<T>::backward(run, flow);
    if (!run.in_factors(this->weight()) || !run.wanted(flow, this->input())) return;
    add_transposed_product(run, product_shape(), moved(run), run.arrived(flow, this->output),
                           run.place(flow, this->input()));
  }

  void tangent(Run<T>& run) const override {
    if (!run.in_factors(this->weight())) return WeightedOp<T>::tangent(run);
    const T *dx = run.tangent(this->input()), *bias_direction = run.direction(this->bias());
    T* dy = run.tangent_out(this->output);
    if (dx != nullptr) {
      product(run, {dx, run.weight(this->weight()), nullptr, nullptr}, bias_direction, dy);
      add_product(run, product_shape(), moved(run), dx, dy);
    } else if (bias_direction != nullptr) {
      this->broadcast_bias(run, bias_direction, dy);
      run.sync();
    } else {
      clear_rows(rows(run), padded(this->out_channels_, run.kernels.lanes), dy, run.share);
      run.sync();
    }
    add_product(run, product_shape(), direction(run), run.value(this->input()), dy);
  }

  void backward_tangent(Run<T>& run) const override {
    const T* dgy = run.arrived(run.second, this->output);
    const bool begun = run.second.value_written[this->input()] != 0;
    WeightedOp<T>::backward_tangent(run);
    if (!run.in_factors(this->weight()) || !run.wanted(run.second, this->input())) return;
    const Target<T> dgx = run.into(run.second, this->input());
    if (dgy != nullptr) {
      add_transposed_product(run, product_shape(), moved(run), dgy, dgx.data);
    } else if (!begun) {
      clear_rows(rows(run), padded(in_channels_, run.kernels.lanes), dgx.data, run.share);
      run.sync();
    }
    add_transposed_product(run, product_shape(), direction(run), run.gradient(this->output),
                           dgx.data);
  }

 protected:
  Index rows(const Run<T>& run) const override { return run.examples() * positions_; }

  void product(Run<T>& run, const Pairs<T>& x_w, const T* bias, T* y) const override {
    run.kernels.matmul(rows(run), in_channels_, this->out_channels_, x_w.a[0], this->ldx_, x_w.b[0],
                       x_w.a[1], this->ldx_, x_w.b[1], bias, y, false, run.share);
  }
  void weight_product(Run<T>& run, const Pairs<T>& x_gy, Target<T> gw) const override {
    run.kernels.matmul_tn(rows(run), in_channels_, this->out_channels_, x_gy.a[0], this->ldx_,
                          x_gy.b[0], x_gy.a[1], this->ldx_, x_gy.b[1], gw.data, gw.accumulate,
                          run.share);
  }
  void input_gradient(Run<T>& run, const Pairs<T>& gy_wt, Target<T> gx) const override {
    const Index ld = padded(this->out_channels_, run.kernels.lanes);
    run.kernels.matmul(rows(run), this->out_channels_, in_channels_, gy_wt.a[0], ld, gy_wt.b[0],
                       gy_wt.a[1], ld, gy_wt.b[1], nullptr, gx.data, gx.accumulate, run.share);
  }

 private:
  const Factors<T>& moved(const Run<T>& run) const { return run.factors->moved[this->weight()]; }
  const Factors<T>& direction(const Run<T>& run) const {
    return run.factors->directions[this->weight()];
  }

  Index in_channels_ = 0;
  Index positions_ = 1;
};

// Of a convolution to so many channels with a weight of [.., .., kernel_h, kernel_w].
ConvGeometry conv_geometry(const OpReader& reader, Index out_channels, const Shape& weight) {
  const Shape& x = reader.input(0);
  const auto stride = reader.pair("stride", 1);
  const auto padding = reader.pair("padding", 0);
  const auto dilation = reader.pair("dilation", 1);
  const auto extent = [&](int axis) {
    const Index reach = dilation[axis] * (weight[2 + axis] - 1) + 1;
    const Index room = x[1 + axis] + 2 * padding[axis] - reach;
    if (room < 0) {
      reader.fail("the kernel is larger than the padded input " + to_string(x));
    }
    return room / stride[axis] + 1;
  };
  const Shape expected = {out_channels, extent(0), extent(1)};
  reader.expect_output(expected);
  const auto narrow = [](Index value) { return static_cast<int>(value); };
  return {narrow(x[0]),      narrow(out_channels), narrow(x[1]),
          narrow(x[2]),      narrow(expected[1]),  narrow(expected[2]),
          narrow(weight[2]), narrow(weight[3]),    stride[0],
          stride[1],         padding[0],           padding[1],
          dilation[0],       dilation[1]};
}

template <typename T>
class Conv2dOp final : public WeightedOp<T> {
 public:
  explicit Conv2dOp(OpReader& reader) {
    const Shape& x = reader.image_input(0);
    const Shape& weight = reader.slot_shape(0, "weight");
    if (weight.size() != 4 || weight[1] != x[0]) {
      reader.fail("weight must have shape [out_channels, " + std::to_string(x[0]) +
                  ", kernel_h, kernel_w], got " + to_string(weight));
    }
    geometry_ = conv_geometry(reader, weight[0], weight);
    const Shape& expected = reader.output();
    this->out_channels_ = weight[0];
    this->slots = {reader.parameter(0, "weight", weight, true),
                   reader.parameter(1, "bias", {weight[0]}, false)};
    this->place(reader, channels_first(x, reader.lanes()), channels_first(expected, reader.lanes()),
                true);
  }

  void reserve(const Kernels<T>& kernels, BatchPlan<T>& batch, OpPlaces& places) const override {
    places.conv.reset(kernels.conv_plan(geometry_, batch.examples), kernels.conv_plan_free);
  }

  Index multiplications() const override {
    return Index{geometry_.out_height} * geometry_.out_width * geometry_.kernel_h *
           geometry_.kernel_w * geometry_.in_channels * geometry_.out_channels;
  }

 protected:
  Index rows(const Run<T>& run) const override {
    return run.examples() * geometry_.out_height * geometry_.out_width;
  }
  void product(Run<T>& run, const Pairs<T>& x_w, const T* bias, T* y) const override {
    run.kernels.conv_forward(plan(run), x_w.a[0], this->ldx_, x_w.b[0], x_w.a[1], x_w.b[1], bias, y,
                             run.share);
  }
  void weight_product(Run<T>& run, const Pairs<T>& x_gy, Target<T> gw) const override {
    run.kernels.conv_weight_grad(plan(run), x_gy.a[0], this->ldx_, x_gy.b[0], x_gy.a[1], x_gy.b[1],
                                 gw.data, gw.accumulate, run.share);
  }
  void input_gradient(Run<T>& run, const Pairs<T>& gy_wt, Target<T> gx) const override {
    run.kernels.conv_input_grad(plan(run), gy_wt.a[0], gy_wt.b[0], gy_wt.a[1], gy_wt.b[1], gx.data,
                                gx.accumulate, run.share);
  }

 private:
  const ConvPlan& plan(const Run<T>& run) const { return *this->places(run).conv; }

  ConvGeometry geometry_;
};

// Channels in planes, of each group one: a vector holds so many groups. Weights and biases come as
// [groups, ...], so that they are packed like that as well.
template <typename T>
class GroupedConv2dOp final : public WeightedOp<T> {
 public:
  explicit GroupedConv2dOp(OpReader& reader) {
    const Shape& x = reader.image_input(0);
    const Index groups = reader.integer("groups", 1), out = reader.output().front();
    if (x[0] % groups != 0 || out % groups != 0) {
      reader.fail("groups must divide the channels " + std::to_string(x[0]) + " and " +
                  std::to_string(out) + ", got " + std::to_string(groups));
    }
    const Index in_planes = x[0] / groups, out_planes = out / groups;
    const Shape& weight = reader.slot_shape(0, "weight");
    if (weight.size() != 4) {
      reader.fail("weight must have shape [groups, channels, kernel_h, kernel_w], got " +
                  to_string(weight));
    }
    this->slots = {
        reader.parameter(0, "weight", {groups, out_planes * in_planes, weight[2], weight[3]}, true),
        reader.parameter(1, "bias", {groups, out_planes}, false)};
    const ConvGeometry geometry = conv_geometry(reader, out, weight);
    plan_ = std::make_unique<GroupedConvPlan>(geometry, groups);
    this->out_channels_ = groups;
    positions_ = Index{geometry.out_height} * geometry.out_width;
    const auto planes = [&](Index count, Index height, Index width) {
      return channels_first({groups, count, height, width}, reader.lanes());
    };
    const Place from = reader.need(0, planes(in_planes, x[1], x[2]), Padding::kRequired);
    this->place_around(reader, from, planes(out_planes, geometry.out_height, geometry.out_width),
                       true);
  }

  Index multiplications() const override {
    const GroupedSweep& s = plan_->forward();
    return positions_ * s.kernel_h * s.kernel_w * s.in_planes * s.out_planes * s.groups;
  }

 protected:
  Index rows(const Run<T>& run) const override {
    return run.examples() * plan_->forward().out_planes * positions_;
  }
  void product(Run<T>& run, const Pairs<T>& x_w, const T* bias, T* y) const override {
    run.kernels.grouped_conv_sweep(plan_->forward(), run.examples(), x_w.a[0], x_w.b[0], x_w.a[1],
                                   x_w.b[1], bias, y, false, run.share);
  }
  void weight_product(Run<T>& run, const Pairs<T>& x_gy, Target<T> gw) const override {
    run.kernels.grouped_conv_weight_grad(plan_->forward(), run.examples(), x_gy.a[0], x_gy.b[0],
                                         x_gy.a[1], x_gy.b[1], gw.data, gw.accumulate, run.share);
  }
  void input_gradient(Run<T>& run, const Pairs<T>& gy_w, Target<T> gx) const override {
    run.kernels.grouped_conv_sweep(plan_->input_grad(), run.examples(), gy_w.a[0], gy_w.b[0],
                                   gy_w.a[1], gy_w.b[1], nullptr, gx.data, gx.accumulate,
                                   run.share);
  }
  const T* weight_back(Run<T>& run) const override { return run.weight(this->weight()); }
  const T* direction_back(Run<T>& run) const override { return run.direction(this->weight()); }
  void broadcast_bias(Run<T>& run, const T* row, T* y) const override {
    each_plane(run, [&](Index, Index plane, Index ld, Index start) {
      broadcast_row(positions_, ld, row + plane * ld, y + start, run.share);
    });
  }
  void sum_bias(Run<T>& run, const T* gy, Target<T> sums) const override {
    each_plane(run, [&](Index image, Index plane, Index ld, Index start) {
      run.kernels.column_sums(positions_, this->out_channels_, gy + start, sums.data + plane * ld,
                              sums.accumulate || image > 0, run.share);
    });
  }

 private:
  // body(image, plane, ld, where its rows start)
  template <typename Body>
  void each_plane(const Run<T>& run, const Body& body) const {
    const Index ld = padded(this->out_channels_, run.kernels.lanes);
    const Index planes = plan_->forward().out_planes;
    for (Index i = 0; i < run.examples() * planes; ++i) {
      body(i / planes, i % planes, ld, i * positions_ * ld);
    }
  }

  std::unique_ptr<GroupedConvPlan> plan_;
  Index positions_ = 1;
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_linear(OpReader& reader) {
  return std::make_unique<LinearLayerOp<T>>(reader);
}
template <typename T>
std::unique_ptr<Op<T>> make_conv2d(OpReader& reader) {
  return std::make_unique<Conv2dOp<T>>(reader);
}

template <typename T>
std::unique_ptr<Op<T>> make_grouped_conv2d(OpReader& reader) {
  return std::make_unique<GroupedConv2dOp<T>>(reader);
}

FASTMAML_INSTANTIATE_OP(make_linear)
FASTMAML_INSTANTIATE_OP(make_conv2d)
FASTMAML_INSTANTIATE_OP(make_grouped_conv2d)

}  // namespace fastmaml
