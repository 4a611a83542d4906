// Rearranging: between layouts; parts of values, joined values and repeated ones, and parameters.
#include <algorithm>

#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

template <typename T>
Moving moving(const Target<T>& target) {
  return target.accumulate ? Moving::kAdd : Moving::kWrite;
}

template <typename T>
class RearrangeOp final : public LinearOp<T> {
 public:
  RearrangeOp(int from, const Layout& from_layout, Index from_gradient_ld, int to,
              const Layout& to_layout)
      : forth_(rearrangement(from_layout, to_layout)),
        back_(rearrangement(to_layout, with_ld(from_layout, from_gradient_ld))) {
    this->inputs = {from};
    this->output = to;
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    const Target<T> gx = run.into(flow, this->inputs[0]);
    run.kernels.rearrange(run.examples(), back_, gy, gx.data, moving(gx), run.share);
  }

 protected:
  void apply(Run<T>& run, const T* x, T* y) const override {
    run.kernels.rearrange(run.examples(), forth_, x, y, Moving::kWrite, run.share);
  }

 private:
  Rearrangement forth_, back_;
};

// One after the other along an axis.
template <typename T>
class CatOp final : public Op<T> {
 public:
  explicit CatOp(OpReader& reader) {
    const Shape& y = reader.output();
    const Layout out = usual_layout(y, reader.lanes());
    const Index axis = reader.axis("dim");
    Index start = 0;
    for (int i = 0; i < static_cast<int>(reader.op().inputs.size()); ++i) {
      Shape expected = y;
      expected[axis] = reader.input(i).size() == y.size() ? reader.input(i)[axis] : 0;
      if (reader.input(i) != expected || start + expected[axis] > y[axis]) {
        reader.fail("output must be the inputs joined, got " + to_string(y) + " where input " +
                    std::to_string(i) + " has shape " + to_string(reader.input(i)));
      }
      const Place place = reader.need_any(i);
      const Layout part = narrowed(out, y, axis, start, expected[axis]);
      this->inputs.push_back(place.storage);
      forth_.push_back(rearrangement(place.layout, part));
      back_.push_back(rearrangement(part, place.layout));
      start += expected[axis];
    }
    if (start != y[axis]) {
      reader.fail("output must be as long as the inputs together, " + std::to_string(start) +
                  ", got " + to_string(y));
    }
    this->output = reader.produce(out);
  }

  void forward(Run<T>& run) const override {
    join(run, run.value_out(this->output), [&](int storage) { return run.value(storage); });
  }
  void tangent(Run<T>& run) const override {
    join(run, run.tangent_out(this->output), [&](int storage) { return run.tangent(storage); });
  }
  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    for (std::size_t i = 0; i < back_.size(); ++i) {
      const Target<T> gx = run.into(flow, this->inputs[i]);
      if (!gx) continue;
      run.kernels.rearrange(run.examples(), back_[i], gy, gx.data, moving(gx), run.share);
    }
  }
  void backward_tangent(Run<T>& run) const override {
    if (run.arrived(run.second, this->output) != nullptr) backward(run, run.second);
  }

 private:
  template <typename Source>
  void join(Run<T>& run, T* out, Source source) const {
    Moving how = Moving::kWrite;
    for (std::size_t i = 0; i < forth_.size(); ++i) {
      const T* x = source(this->inputs[i]);
      if (x == nullptr) continue;
      run.kernels.rearrange(run.examples(), forth_[i], x, out, how, run.share);
      how = Moving::kWriteLeavingGaps;
    }
  }

  std::vector<Rearrangement> forth_, back_;  // by input
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
    if (!fits) {
      reader.fail("output must repeat axes of length 1 of the input " + to_string(x) + ", got " +
                  to_string(y));
    }
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

// A parameter as a value, the same for every example.
template <typename T>
class ParameterOp final : public Op<T> {
 public:
  explicit ParameterOp(OpReader& reader) : size_(element_count(reader.output())) {
    ld_ = padded(size_, reader.lanes());
    this->slots = {reader.parameter(0, "parameter", {size_}, true)};
    this->output = reader.produce(with_ld(dense_layout(reader.output()), ld_));
  }

  void forward(Run<T>& run) const override {
    repeat(run, run.weight(this->slots[0]), run.value_out(this->output));
  }
  void tangent(Run<T>& run) const override {
    repeat(run, run.direction(this->slots[0]), run.tangent_out(this->output));
  }
  void backward(Run<T>& run, Flow<T>& flow) const override {
    if (const Target<T> sums = run.into_slot(flow, this->slots[0])) {
      run.kernels.column_sums(run.examples(), size_, run.arrived(flow, this->output), sums.data,
                              sums.accumulate, run.share);
    }
  }
  void backward_tangent(Run<T>& run) const override {
    if (run.arrived(run.second, this->output) != nullptr) backward(run, run.second);
  }

 private:
  void repeat(const Run<T>& run, const T* row, T* out) const {
    const Range mine = split(run.examples(), run.share);
    for (Index n = mine.begin; n < mine.end; ++n) std::copy(row, row + ld_, out + n * ld_);
  }

  Index size_, ld_ = 0;
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_parameter(OpReader& reader) {
  return std::make_unique<ParameterOp<T>>(reader);
}

template <typename T>
std::unique_ptr<Op<T>> make_cat(OpReader& reader) {
  return std::make_unique<CatOp<T>>(reader);
}

template <typename T>
std::unique_ptr<Op<T>> make_narrow(OpReader& reader) {
  const Shape &x = reader.input(0), &y = reader.output();
  const Index axis = reader.axis("dim"), start = reader.integer("start", 0);
  Shape expected = x;
  if (x.size() == y.size()) expected[axis] = y[axis];
  if (y != expected || start + y[axis] > x[axis]) {
    reader.fail("output must be a part of the input " + to_string(x) + ", got " + to_string(y) +
                " from " + std::to_string(start));
  }
  const Place from = reader.need_any(0);
  const Layout part = narrowed(from.layout, x, axis, start, y[axis]);
  const Layout out = usual_layout(y, reader.lanes());
  const int output = reader.produce(out);
  return std::make_unique<RearrangeOp<T>>(from.storage, part, part.ld, output, out);
}

template <typename T>
std::unique_ptr<Op<T>> make_expand(OpReader& reader) {
  return std::make_unique<ExpandOp<T>>(reader);
}

template <typename T>
std::unique_ptr<Op<T>> make_rearrange(int from, const Layout& from_layout, Index from_gradient_ld,
                                      int to, const Layout& to_layout) {
  return std::make_unique<RearrangeOp<T>>(from, from_layout, from_gradient_ld, to, to_layout);
}

FASTMAML_INSTANTIATE_OP(make_parameter)
FASTMAML_INSTANTIATE_OP(make_cat)
FASTMAML_INSTANTIATE_OP(make_narrow)
FASTMAML_INSTANTIATE_OP(make_expand)
template std::unique_ptr<Op<float>> make_rearrange<float>(int, const Layout&, Index, int,
                                                          const Layout&);
template std::unique_ptr<Op<double>> make_rearrange<double>(int, const Layout&, Index, int,
                                                            const Layout&);

}  // namespace fastmaml
