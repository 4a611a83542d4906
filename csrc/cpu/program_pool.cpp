// Pooling and means.
#include <algorithm>

#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

struct Window {
  Index begin, end;  // inside the input
  Index padded_extent;
};

// Windows along one axis as torch lays them out: they may hang over the padded input where
// ceil_mode lets them, and the part beyond the padding does not count.
std::vector<Window> pool_windows(Index size, Index out_size, int kernel, int stride, int padding,
                                 int dilation) {
  std::vector<Window> windows;
  for (Index o = 0; o < out_size; ++o) {
    Index begin = o * stride - padding;
    const Index reach = begin + static_cast<Index>(dilation) * (kernel - 1) + 1;
    const Index extent = std::min(reach, size + padding) - begin;
    while (begin < 0) begin += dilation;
    windows.push_back({begin, std::min(reach, size), extent});
  }
  return windows;
}

std::vector<Window> adaptive_windows(Index size, Index out_size) {
  std::vector<Window> windows;
  for (Index o = 0; o < out_size; ++o) {
    const Index begin = o * size / out_size;
    const Index end = ((o + 1) * size + out_size - 1) / out_size;
    windows.push_back({begin, end, end - begin});
  }
  return windows;
}

template <typename Scale>
PoolGeometry pool_geometry(const OpReader& reader, const Shape& in, const Shape& out,
                           const std::vector<Window>& rows, const std::vector<Window>& columns,
                           const Scale& scale) {
  PoolGeometry geometry;
  geometry.height = static_cast<int>(in[1]);
  geometry.width = static_cast<int>(in[2]);
  geometry.out_height = static_cast<int>(out[1]);
  geometry.out_width = static_cast<int>(out[2]);
  geometry.step_h = geometry.step_w = 1;
  for (const Window& row : rows) {
    for (const Window& column : columns) {
      if (row.begin >= row.end || column.begin >= column.end) {
        reader.fail("output must have no window outside the input, got " + to_string(out) +
                    " for an input of shape " + to_string(in));
      }
      geometry.windows.push_back({static_cast<int>(row.begin), static_cast<int>(row.end),
                                  static_cast<int>(column.begin), static_cast<int>(column.end),
                                  scale(row, column)});
    }
  }
  return geometry;
}

void expect_pooled(const OpReader& reader) {
  const Shape& x = reader.image_input(0);
  const Shape& y = reader.output();
  if (y.size() != 3 || y[0] != x[0]) {
    reader.fail("output must have shape [" + std::to_string(x[0]) + ", H, W], got " + to_string(y));
  }
}

template <typename T>
class MaxPoolOp final : public Op<T> {
 public:
  explicit MaxPoolOp(OpReader& reader) {
    expect_pooled(reader);
    const Shape& x = reader.input(0);
    const Shape& y = reader.output();
    const auto kernel = reader.pair("kernel", 1);
    const auto stride = reader.pair("stride", 1);
    const auto padding = reader.pair("padding", 0);
    const auto dilation = reader.pair("dilation", 1);
    geometry_ = pool_geometry(
        reader, x, y, pool_windows(x[1], y[1], kernel[0], stride[0], padding[0], dilation[0]),
        pool_windows(x[2], y[2], kernel[1], stride[1], padding[1], dilation[1]),
        [](const Window&, const Window&) { return 1.0; });
    geometry_.step_h = dilation[0];
    geometry_.step_w = dilation[1];
    const Place place = reader.need(0, channels_first(x, reader.lanes()), Padding::kRequired);
    const Layout out = channels_first(y, reader.lanes());
    ld_ = out.ld;
    out_size_ = out.size();
    this->inputs = {place.storage};
    this->output = reader.produce(out);
  }

  void reserve(const Kernels<T>&, BatchPlan<T>& batch, OpPlaces& places) const override {
    const Index bytes = batch.examples * out_size_ * static_cast<Index>(sizeof(std::int32_t));
    const Index element = static_cast<Index>(sizeof(T));
    places.saved = {batch.reserve_value((bytes + element - 1) / element)};
  }

  void forward(Run<T>& run) const override {
    run.kernels.max_pool_forward(geometry_, run.examples(), ld_, run.value(this->inputs[0]),
                                 run.value_out(this->output), argmax(run), run.share);
  }
  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    const Target<T> gx = run.into(flow, this->inputs[0]);
    run.kernels.max_pool_backward(geometry_, run.examples(), ld_, argmax(run), gy, gx.data,
                                  gx.accumulate, run.share);
  }
  void tangent(Run<T>& run) const override {
    run.kernels.max_pool_tangent(geometry_, run.examples(), ld_, argmax(run),
                                 run.tangent(this->inputs[0]), run.tangent_out(this->output),
                                 run.share);
  }
  void backward_tangent(Run<T>& run) const override {
    if (run.arrived(run.second, this->output) != nullptr) backward(run, run.second);
  }

 private:
  std::int32_t* argmax(const Run<T>& run) const {
    return reinterpret_cast<std::int32_t*>(run.values + this->places(run).saved[0]);
  }

  PoolGeometry geometry_;
  Index ld_ = 0;
  Index out_size_ = 0;
};

// Weighted sums over windows.
template <typename T>
class AveragePoolOp final : public LinearOp<T> {
 public:
  AveragePoolOp(OpReader& reader, const Layout& in, const Layout& out, PoolGeometry geometry)
      : geometry_(std::move(geometry)), ld_(out.ld) {
    this->inputs = {reader.need(0, in, Padding::kRequired).storage};
    this->output = reader.produce(out);
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    const Target<T> gx = run.into(flow, this->inputs[0]);
    run.kernels.avg_pool_backward(geometry_, run.examples(), ld_, gy, gx.data, gx.accumulate,
                                  run.share);
  }

 protected:
  void apply(Run<T>& run, const T* x, T* y) const override {
    run.kernels.avg_pool_forward(geometry_, run.examples(), ld_, ld_, x, y, run.share);
  }

 private:
  PoolGeometry geometry_;
  Index ld_;
};

template <typename T>
std::unique_ptr<Op<T>> image_average(OpReader& reader, PoolGeometry geometry) {
  return std::make_unique<AveragePoolOp<T>>(reader, channels_first(reader.input(0), reader.lanes()),
                                            channels_first(reader.output(), reader.lanes()),
                                            std::move(geometry));
}

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_max_pool2d(OpReader& reader) {
  return std::make_unique<MaxPoolOp<T>>(reader);
}

template <typename T>
std::unique_ptr<Op<T>> make_avg_pool2d(OpReader& reader) {
  expect_pooled(reader);
  const Shape& x = reader.input(0);
  const Shape& y = reader.output();
  const auto kernel = reader.pair("kernel", 1);
  const auto stride = reader.pair("stride", 1);
  const auto padding = reader.pair("padding", 0);
  const bool include_padding = reader.flag("count_include_pad");
  const Index divisor = reader.has("divisor") ? reader.integer("divisor", 1) : 0;
  const auto scale = [&](const Window& row, const Window& column) {
    if (divisor > 0) return 1.0 / static_cast<double>(divisor);
    const Index count = include_padding ? row.padded_extent * column.padded_extent
                                        : (row.end - row.begin) * (column.end - column.begin);
    return 1.0 / static_cast<double>(count);
  };
  return image_average<T>(
      reader,
      pool_geometry(reader, x, y, pool_windows(x[1], y[1], kernel[0], stride[0], padding[0], 1),
                    pool_windows(x[2], y[2], kernel[1], stride[1], padding[1], 1), scale));
}

template <typename T>
std::unique_ptr<Op<T>> make_adaptive_avg_pool2d(OpReader& reader) {
  expect_pooled(reader);
  const Shape& x = reader.input(0);
  const Shape& y = reader.output();
  const auto scale = [](const Window& row, const Window& column) {
    return 1.0 / static_cast<double>(row.padded_extent * column.padded_extent);
  };
  return image_average<T>(reader, pool_geometry(reader, x, y, adaptive_windows(x[1], y[1]),
                                                adaptive_windows(x[2], y[2]), scale));
}

template <typename T>
std::unique_ptr<Op<T>> make_mean(OpReader& reader) {
  const Shape& x = reader.input(0);
  std::vector<bool> kept(x.size(), true);
  for (Index axis : reader.axes("dims")) kept[axis] = false;
  const bool keepdim = reader.flag("keepdim");
  Shape expected;
  for (std::size_t axis = 0; axis < x.size(); ++axis) {
    if (kept[axis]) expected.push_back(x[axis]);
    if (!kept[axis] && keepdim) expected.push_back(1);
  }
  reader.expect_output(expected);
  const Layout in = channel_layout(x, kept, reader.lanes());
  const Layout out = channels_last({in.channels}, reader.lanes());
  const std::vector<Window> rows = {{0, in.positions, in.positions}};
  const std::vector<Window> columns = {{0, 1, 1}};
  const double scale = 1.0 / static_cast<double>(in.positions);
  return std::make_unique<AveragePoolOp<T>>(
      reader, in, out,
      pool_geometry(reader, {in.channels, in.positions, 1}, {in.channels, 1, 1}, rows, columns,
                    [&](const Window&, const Window&) { return scale; }));
}

FASTMAML_INSTANTIATE_OP(make_max_pool2d)
FASTMAML_INSTANTIATE_OP(make_avg_pool2d)
FASTMAML_INSTANTIATE_OP(make_adaptive_avg_pool2d)
FASTMAML_INSTANTIATE_OP(make_mean)

}  // namespace fastmaml
