// Rearranging: between layouts, and values repeated along an axis.
#include <algorithm>

#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

template <typename T>
class GatherOp final : public LinearOp<T> {
 public:
  GatherOp(int from, const Layout& from_layout, Index from_gradient_ld, int to,
           const Layout& to_layout)
      : map_(gather_map(from_layout, to_layout)) {
    const Layout gradient = with_ld(from_layout, from_gradient_ld);
    from_size_ = from_layout.size();
    gradient_size_ = gradient.size();
    inverse_ = gather_map(to_layout, gradient);
    this->inputs = {from};
    this->output = to;
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    const Target<T> gx = run.into(flow, this->inputs[0]);
    run.kernels.gather(run.examples(), size(), gradient_size_, inverse_.data(), gy, gx.data,
                       gx.accumulate, run.share);
  }

 protected:
  void apply(Run<T>& run, const T* x, T* y) const override {
    run.kernels.gather(run.examples(), from_size_, size(), map_.data(), x, y, false, run.share);
  }

 private:
  Index size() const { return static_cast<Index>(map_.size()); }

  std::vector<std::int32_t> map_, inverse_;
  Index from_size_ = 0, gradient_size_ = 0;
};

// Rows of channels, the axes that are kept; each is repeated at all positions.
template <typename T>
class ExpandOp final : public LinearOp<T> {
 public:
  explicit ExpandOp(OpReader& reader) {
    const Shape& x = reader.input(0);
    const Shape& y = reader.output();
    std::vector<bool> kept(x.size());
    bool fits = x.size() == y.size();
    for (std::size_t axis = 0; fits && axis < x.size(); ++axis) {
      kept[axis] = x[axis] == y[axis];
      fits = kept[axis] || x[axis] == 1;
    }
    if (!fits)
      reader.fail("output must repeat axes of length 1 of the input " + to_string(x) + ", got " +
                  to_string(y));
    const Layout in = channel_layout(x, kept, reader.lanes());
    const Layout out = channel_layout(y, kept, reader.lanes());
    positions_ = out.positions;
    channels_ = out.channels;
    ld_ = out.ld;
    this->inputs = {reader.need(0, in, Padding::kRequired).storage};
    this->output = reader.produce(out);
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    const Target<T> gx = run.into(flow, this->inputs[0]);
    for (Index n = 0; n < run.examples(); ++n) {
      run.kernels.column_sums(positions_, channels_, gy + n * positions_ * ld_, gx.data + n * ld_,
                              gx.accumulate, run.share);
    }
  }

 protected:
  void apply(Run<T>& run, const T* x, T* y) const override {
    const Range mine = split(run.examples() * positions_, run.share);
    for (Index row = mine.begin; row < mine.end; ++row) {
      const T* from = x + row / positions_ * ld_;
      std::copy(from, from + ld_, y + row * ld_);
    }
  }

 private:
  Index positions_ = 0, channels_ = 0, ld_ = 0;
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_expand(OpReader& reader) {
  return std::make_unique<ExpandOp<T>>(reader);
}

template <typename T>
std::unique_ptr<Op<T>> make_gather(int from, const Layout& from_layout, Index from_gradient_ld,
                                   int to, const Layout& to_layout) {
  return std::make_unique<GatherOp<T>>(from, from_layout, from_gradient_ld, to, to_layout);
}

FASTMAML_INSTANTIATE_OP(make_expand)
template std::unique_ptr<Op<float>> make_gather<float>(int, const Layout&, Index, int,
                                                       const Layout&);
template std::unique_ptr<Op<double>> make_gather<double>(int, const Layout&, Index, int,
                                                         const Layout&);

}  // namespace fastmaml
