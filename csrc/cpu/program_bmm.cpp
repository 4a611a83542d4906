// Products of matrices that both depend on the example.
#include "cpu/program_ops.h"
#include "cpu/program_pairs.h"

namespace fastmaml {

namespace {

// y = a b for each of an example's matrices: a [rows][depth], b [depth][columns].
template <typename T>
class BmmOp final : public Op<T> {
 public:
  explicit BmmOp(OpReader& reader) {
    reader.expect_inputs(2);
    const Shape &a = reader.input(0), &b = reader.input(1);
    Shape expected = a;
    if (a.size() < 2 || b.size() != a.size() || b.end()[-2] != a.back()) {
      reader.fail("inputs must be matrices [..., I, K] and [..., K, J], got " + to_string(a) +
                  " and " + to_string(b));
    }
    expected.back() = b.back();
    reader.expect_output(expected);
    rows_ = a.end()[-2];
    depth_ = a.back();
    columns_ = b.back();
    matrices_ = element_count(a) / (rows_ * depth_);
    if (element_count(b) != matrices_ * depth_ * columns_) {
      reader.fail("inputs must have as many matrices, got " + to_string(a) + " and " +
                  to_string(b));
    }
    for (int i = 0; i < 2; ++i) {
      const Layout layout = channels_last(reader.input(i), reader.lanes());
      this->inputs.push_back(reader.need(i, layout, Padding::kRequired).storage);
    }
    this->output = reader.produce(channels_last(expected, reader.lanes()));
  }

  Index multiplications() const override { return matrices_ * rows_ * depth_ * columns_; }

  void reserve(const Kernels<T>& kernels, BatchPlan<T>& batch, OpPlaces& places) const override {
    const Index size = batch.examples * matrices_ * columns_ * padded(depth_, kernels.lanes);
    places.gradient = {batch.reserve_gradient(size)};
    places.tangent = {batch.reserve_tangent(size)};
  }

  void forward(Run<T>& run) const override {
    multiply(run, {run.value(a()), run.value(b()), nullptr, nullptr}, run.value_out(this->output));
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    if (const Target<T> ga = run.into(flow, a())) {
      left_gradient(run, flow, {gy, run.value(b()), nullptr, nullptr}, ga);
    }
    if (const Target<T> gb = run.into(flow, b())) {
      right_gradient(run, {run.value(a()), gy, nullptr, nullptr}, gb);
    }
  }

  void tangent(Run<T>& run) const override {
    multiply(run, {run.tangent(a()), run.value(b()), run.value(a()), run.tangent(b())},
             run.tangent_out(this->output));
  }

  void backward_tangent(Run<T>& run) const override {
    const T* gy = run.gradient(this->output);
    const T* dgy = run.arrived(run.second, this->output);
    const Pairs<T> left(dgy, run.value(b()), gy, run.tangent(b()));
    const Pairs<T> right(run.value(a()), dgy, run.tangent(a()), gy);
    if (left && run.wanted(run.second, a())) {
      left_gradient(run, run.second, left, run.into(run.second, a()));
    }
    if (right && run.wanted(run.second, b())) right_gradient(run, right, run.into(run.second, b()));
  }

 private:
  int a() const { return this->inputs[0]; }
  int b() const { return this->inputs[1]; }

  // body(matrix) for those of a thread, which multiplies them by itself.
  template <typename Body>
  void for_matrices(const Run<T>& run, Body body) const {
    const Range mine = split(run.examples() * matrices_, run.share);
    for (Index i = mine.begin; i < mine.end; ++i) body(i);
  }
  static const T* at(const T* data, Index offset) { return data ? data + offset : nullptr; }

  // y = a b
  void multiply(Run<T>& run, const Pairs<T>& p, T* y) const {
    const Index inner = padded(depth_, run.kernels.lanes);
    const Index outer = padded(columns_, run.kernels.lanes);
    for_matrices(run, [&](Index i) {
      const Index left = i * rows_ * inner, right = i * depth_ * outer;
      run.kernels.matmul(rows_, depth_, columns_, p.a[0] + left, inner, p.b[0] + right,
                         at(p.a[1], left), inner, at(p.b[1], right), nullptr, y + i * rows_ * outer,
                         false, Share{});
    });
  }

  // a = y b^T, of pairs (y, b)
  void left_gradient(Run<T>& run, Flow<T>& flow, const Pairs<T>& p, Target<T> ga) const {
    const Index inner = padded(depth_, run.kernels.lanes);
    const Index outer = padded(columns_, run.kernels.lanes);
    T* turned[2] = {flow.region + this->places(run).gradient[0],
                    p.count > 1 ? run.tangents + this->places(run).tangent[0] : nullptr};
    for_matrices(run, [&](Index i) {
      const Index left = i * rows_ * outer, right = i * columns_ * inner;
      for (int k = 0; k < p.count; ++k) {
        run.kernels.transpose(1, depth_, columns_, p.b[k] + i * depth_ * outer, turned[k] + right,
                              Share{});
      }
      run.kernels.matmul(rows_, columns_, depth_, p.a[0] + left, outer, turned[0] + right,
                         at(p.a[1], left), outer, at(turned[1], right), nullptr,
                         ga.data + i * rows_ * inner, ga.accumulate, Share{});
    });
  }

  // b = a^T y, of pairs (a, y)
  void right_gradient(Run<T>& run, const Pairs<T>& p, Target<T> gb) const {
    const Index inner = padded(depth_, run.kernels.lanes);
    const Index outer = padded(columns_, run.kernels.lanes);
    for_matrices(run, [&](Index i) {
      const Index left = i * rows_ * inner, right = i * rows_ * outer;
      run.kernels.matmul_tn(rows_, depth_, columns_, p.a[0] + left, inner, p.b[0] + right,
                            at(p.a[1], left), inner, at(p.b[1], right),
                            gb.data + i * depth_ * outer, gb.accumulate, Share{});
    });
  }

  Index matrices_ = 1, rows_ = 0, depth_ = 0, columns_ = 0;
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_bmm(OpReader& reader) {
  return std::make_unique<BmmOp<T>>(reader);
}

FASTMAML_INSTANTIATE_OP(make_bmm)

}  // namespace fastmaml
