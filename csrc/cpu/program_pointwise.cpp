// Activations, sums, products, scalings, masks and constants: ops on elements, in whatever layout
// they find.
#include <algorithm>
#include <utility>

#include "cpu/activation_names.h"
#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

Activation known_activation(const OpReader& reader, const std::string& name) {
  const std::optional<Activation> found = activation_named(name);
  if (!found) reader.fail("function '" + name + "' is not known");
  return *found;
}

// Not finite everywhere: padding, which may hold anything finite, is then left out and set to zero.
bool is_singular(Activation function) {
  return function == Activation::kReciprocal || function == Activation::kSqrt ||
         function == Activation::kRsqrt || function == Activation::kLength ||
         function == Activation::kLog;
}

bool is_step(Activation function) {
  return function == Activation::kIsPositive || function == Activation::kIsZero;
}

template <typename T>
class ActivationOp final : public Op<T> {
 public:
  explicit ActivationOp(OpReader& reader)
      : function_(known_activation(reader, reader.text("function"))),
        alpha_(static_cast<T>(reader.number("alpha"))),
        beta_(static_cast<T>(reader.number("beta"))) {
    reader.expect_output(reader.input(0));
    const Place place = reader.need_any(0);
    size_ = place.layout.size();
    width_ = used_ = size_;
    if (is_singular(function_)) {
      width_ = place.layout.ld;
      used_ = place.layout.channels;
    }
    this->inputs = {place.storage};
    // The sign of its output is all that a ReLU needs to know of its input.
    in_place_ = function_ == Activation::kRelu && reader.may_overwrite(0, place);
    this->output = in_place_            ? reader.produce_in_place(place)
                   : is_step(function_) ? reader.produce_constant(place.layout)
                                        : reader.produce(place.layout);
  }

  void forward(Run<T>& run) const override {
    const T* x = run.value(input());
    T* y = run.value_out(this->output);
    for_pieces(run, y, false, [&](Index at, Index count, Share share) {
      run.kernels.act_forward(function_, alpha_, beta_, count, x + at, y + at, share);
    });
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T *x = run.value(input()), *gy = run.arrived(flow, this->output);
    const Target<T> gx = into(run, flow);
    for_pieces(run, gx.data, gx.accumulate, [&](Index at, Index count, Share share) {
      run.kernels.act_backward(function_, alpha_, beta_, count, x + at, gy + at, gx.data + at,
                               gx.accumulate, share);
    });
  }

  void tangent(Run<T>& run) const override {
    const T *x = run.value(input()), *dx = run.tangent(input());
    T* dy = run.tangent_out(this->output);
    for_pieces(run, dy, false, [&](Index at, Index count, Share share) {
      run.kernels.act_tangent(function_, alpha_, beta_, count, x + at, dx + at, dy + at, share);
    });
  }

  void backward_tangent(Run<T>& run) const override {
    const T *x = run.value(input()), *dx = run.tangent(input());
    const T *gy = run.gradient(this->output), *dgy = run.arrived(run.second, this->output);
    if (in_place_ && dgy == nullptr) return;  // a ReLU has no curvature
    const Target<T> dgx = into(run, run.second);
    for_pieces(run, dgx.data, dgx.accumulate, [&](Index at, Index count, Share share) {
      run.kernels.act_backward_tangent(function_, alpha_, beta_, count, x + at,
                                       dx ? dx + at : nullptr, gy + at, dgy ? dgy + at : nullptr,
                                       dgx.data + at, dgx.accumulate, share);
    });
  }

 private:
  int input() const { return this->inputs[0]; }

  Target<T> into(Run<T>& run, Flow<T>& flow) const {
    Target<T> target = run.into(flow, input());
    if (in_place_) target.accumulate = false;
    return target;
  }

  // body(first element, elements, share): all at once, or rows without their padding, which in
  // `out` becomes zero.
  template <typename Body>
  void for_pieces(Run<T>& run, T* out, bool accumulate, Body body) const {
    if (used_ == width_) return body(0, run.examples() * size_, run.share);
    const Range mine = split(run.examples() * size_ / width_, run.share);
    for (Index row = mine.begin; row < mine.end; ++row) {
      body(row * width_, used_, Share{});
      if (!accumulate) std::fill_n(out + row * width_ + used_, width_ - used_, T(0));
    }
  }

  Activation function_;
  T alpha_, beta_;
  Index size_ = 0;
  Index width_ = 0, used_ = 0;  // of a row, where rows are taken one by one
  bool in_place_ = false;
};

// Two inputs and an output of one shape, in the layout of the first.
struct Operands {
  explicit Operands(OpReader& reader) {
    reader.expect_inputs(2);
    reader.expect_output(reader.input(0));
    reader.expect_output(reader.input(1));
    const Place a = reader.need_any(0);
    const Place b = reader.need(1, a.layout, Padding::kRequired);
    layout = a.layout;
    storages = {a.storage, b.storage};
  }

  Layout layout;
  std::vector<int> storages;
};

template <typename T>
class AddOp final : public Op<T> {
 public:
  explicit AddOp(OpReader& reader) : alpha_(static_cast<T>(reader.number("alpha"))) {
    const Operands operands(reader);
    size_ = operands.layout.size();
    this->inputs = operands.storages;
    this->output = reader.produce(operands.layout);
  }

  void forward(Run<T>& run) const override {
    sum(run, run.value(this->inputs[0]), run.value(this->inputs[1]), run.value_out(this->output));
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    const T factors[2] = {T(1), alpha_};
    for (int i = 0; i < 2; ++i) {
      const Target<T> gx = run.into(flow, this->inputs[i]);
      if (!gx) continue;
      run.kernels.axpby(run.examples() * size_, factors[i], gy, T(0), nullptr, gx.data,
                        gx.accumulate, run.share);
    }
  }

  void tangent(Run<T>& run) const override {
    sum(run, run.tangent(this->inputs[0]), run.tangent(this->inputs[1]),
        run.tangent_out(this->output));
  }

  void backward_tangent(Run<T>& run) const override {
    if (run.arrived(run.second, this->output) != nullptr) backward(run, run.second);
  }

 private:
  void sum(Run<T>& run, const T* a, const T* b, T* out) const {
    const Index count = run.examples() * size_;
    if (a == nullptr) {
      run.kernels.axpby(count, alpha_, b, T(0), nullptr, out, false, run.share);
    } else {
      run.kernels.axpby(count, T(1), a, alpha_, b, out, false, run.share);
    }
  }

  T alpha_;
  Index size_ = 0;
};

template <typename T>
class MulOp final : public Op<T> {
 public:
  explicit MulOp(OpReader& reader) {
    const Operands operands(reader);
    size_ = operands.layout.size();
    this->inputs = operands.storages;
    this->output = reader.produce(operands.layout);
  }

  void forward(Run<T>& run) const override {
    const T* b = run.value(this->inputs[1]);
    products(run, run.value(this->inputs[0]), b, nullptr, b, {run.value_out(this->output)});
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    for (int i = 0; i < 2; ++i) {
      const T* other = run.value(this->inputs[1 - i]);
      const Target<T> gx = run.into(flow, this->inputs[i]);
      if (gx) products(run, gy, other, nullptr, other, gx);
    }
  }

  void tangent(Run<T>& run) const override {
    products(run, run.tangent(this->inputs[0]), run.value(this->inputs[1]),
             run.tangent(this->inputs[1]), run.value(this->inputs[0]),
             {run.tangent_out(this->output)});
  }

  void backward_tangent(Run<T>& run) const override {
    const T* gy = run.gradient(this->output);
    const T* dgy = run.arrived(run.second, this->output);
    for (int i = 0; i < 2; ++i) {
      const int other = this->inputs[1 - i];
      if (dgy == nullptr && !run.has_tangent(other)) continue;
      const Target<T> dgx = run.into(run.second, this->inputs[i]);
      if (dgx) products(run, dgy, run.value(other), run.tangent(other), gy, dgx);
    }
  }

 private:
  // out (+)= a b + c d, without a product whose first factor is null (zero).
  void products(Run<T>& run, const T* a, const T* b, const T* c, const T* d,
                const Target<T>& out) const {
    if (a == nullptr) {
      std::swap(a, c);
      std::swap(b, d);
    }
    run.kernels.multiply(run.examples() * size_, a, b, c, d, out.data, out.accumulate, run.share);
  }

  Index size_ = 0;
};

template <typename T>
class MaskedFillOp final : public Op<T> {
 public:
  explicit MaskedFillOp(OpReader& reader) : value_(static_cast<T>(reader.number("value"))) {
    const Operands operands(reader);
    size_ = operands.layout.size();
    this->inputs = operands.storages;
    this->output = reader.produce(operands.layout);
  }

  void forward(Run<T>& run) const override {
    fill(run, run.value(this->inputs[0]), value_, {run.value_out(this->output)});
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const Target<T> gx = run.into(flow, this->inputs[0]);
    if (gx) fill(run, run.arrived(flow, this->output), T(0), gx);
  }

  void tangent(Run<T>& run) const override {
    fill(run, run.tangent(this->inputs[0]), T(0), {run.tangent_out(this->output)});
  }

  void backward_tangent(Run<T>& run) const override {
    if (run.arrived(run.second, this->output) != nullptr) backward(run, run.second);
  }

 private:
  void fill(Run<T>& run, const T* x, T value, const Target<T>& out) const {
    run.kernels.masked_fill(run.examples() * size_, run.value(this->inputs[1]), x, value, out.data,
                            out.accumulate, run.share);
  }

  T value_;
  Index size_ = 0;
};

template <typename T>
class ScaleOp final : public LinearOp<T> {
 public:
  explicit ScaleOp(OpReader& reader)
      : alpha_(static_cast<T>(reader.number("alpha"))),
        beta_(static_cast<T>(reader.number("beta"))) {
    reader.expect_output(reader.input(0));
    const Place place = reader.need_any(0);
    size_ = place.layout.size();
    this->inputs = {place.storage};
    this->output = reader.produce(place.layout);
  }

  void forward(Run<T>& run) const override {
    const T* x = run.value(this->inputs[0]);
    T* y = run.value_out(this->output);
    const Range part = split(run.examples() * size_, run.share);
    for (Index i = part.begin; i < part.end; ++i) y[i] = alpha_ * x[i] + beta_;
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    const Target<T> gx = run.into(flow, this->inputs[0]);
    run.kernels.axpby(run.examples() * size_, alpha_, gy, T(0), nullptr, gx.data, gx.accumulate,
                      run.share);
  }

 protected:
  void apply(Run<T>& run, const T* dx, T* dy) const override {
    run.kernels.axpby(run.examples() * size_, alpha_, dx, T(0), nullptr, dy, false, run.share);
  }

 private:
  T alpha_, beta_;
  Index size_ = 0;
};

// The input as a constant: no pass over gradients or tangents comes here.
template <typename T>
class DetachOp final : public Op<T> {
 public:
  explicit DetachOp(OpReader& reader) {
    reader.expect_output(reader.input(0));
    const Place place = reader.need_any(0);
    size_ = place.layout.size();
    this->inputs = {place.storage};
    this->output = reader.produce_constant(place.layout);
  }

  void forward(Run<T>& run) const override {
    const T* x = run.value(this->inputs[0]);
    const Range part = split(run.examples() * size_, run.share);
    std::copy(x + part.begin, x + part.end, run.value_out(this->output) + part.begin);
  }
  void backward(Run<T>&, Flow<T>&) const override {}
  void tangent(Run<T>&) const override {}
  void backward_tangent(Run<T>&) const override {}

 private:
  Index size_ = 0;
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_activation(OpReader& reader) {
  return std::make_unique<ActivationOp<T>>(reader);
}
template <typename T>
std::unique_ptr<Op<T>> make_add(OpReader& reader) {
  return std::make_unique<AddOp<T>>(reader);
}
template <typename T>
std::unique_ptr<Op<T>> make_mul(OpReader& reader) {
  return std::make_unique<MulOp<T>>(reader);
}
template <typename T>
std::unique_ptr<Op<T>> make_masked_fill(OpReader& reader) {
  return std::make_unique<MaskedFillOp<T>>(reader);
}
template <typename T>
std::unique_ptr<Op<T>> make_scale(OpReader& reader) {
  return std::make_unique<ScaleOp<T>>(reader);
}
template <typename T>
std::unique_ptr<Op<T>> make_detach(OpReader& reader) {
  return std::make_unique<DetachOp<T>>(reader);
}

FASTMAML_INSTANTIATE_OP(make_activation)
FASTMAML_INSTANTIATE_OP(make_add)
FASTMAML_INSTANTIATE_OP(make_mul)
FASTMAML_INSTANTIATE_OP(make_masked_fill)
FASTMAML_INSTANTIATE_OP(make_scale)
FASTMAML_INSTANTIATE_OP(make_detach)

}  // namespace fastmaml
