// Softmax along an axis, and its logarithm.
#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

// Its output is all that any pass needs.
template <typename T>
class SoftmaxOp final : public Op<T> {
 public:
  explicit SoftmaxOp(OpReader& reader) : log_(reader.flag("log")), safe_(reader.flag("safe")) {
    reader.expect_output(reader.input(0));
    std::vector<bool> along(reader.input(0).size(), false);
    along[reader.axis("dim")] = true;
    const Layout layout = channel_layout(reader.input(0), along, reader.lanes());
    rows_ = layout.positions;
    columns_ = layout.channels;
    this->inputs = {reader.need(0, layout, Padding::kRequired).storage};
    this->output = reader.produce(layout);
    reader.keep({this->output, layout});
  }

  void forward(Run<T>& run) const override {
    run.kernels.softmax_forward(log_, safe_, rows(run), columns_, run.value(input()),
                                run.value_out(this->output), run.share);
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const Target<T> gx = run.into(flow, input());
    run.kernels.softmax_backward(log_, rows(run), columns_, run.value(this->output),
                                 run.arrived(flow, this->output), gx.data, gx.accumulate,
                                 run.share);
  }

  void tangent(Run<T>& run) const override {
    run.kernels.softmax_tangent(log_, rows(run), columns_, run.value(this->output),
                                run.tangent(input()), run.tangent_out(this->output), run.share);
  }

  void backward_tangent(Run<T>& run) const override {
    const Target<T> dgx = run.into(run.second, input());
    run.kernels.softmax_backward_tangent(log_, rows(run), columns_, run.value(this->output),
                                         run.tangent(this->output), run.gradient(this->output),
                                         run.arrived(run.second, this->output), dgx.data,
                                         dgx.accumulate, run.share);
  }

 private:
  int input() const { return this->inputs[0]; }
  Index rows(const Run<T>& run) const { return run.examples() * rows_; }

  bool log_, safe_;
  Index rows_ = 0, columns_ = 0;  // rows per example
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_softmax(OpReader& reader) {
  return std::make_unique<SoftmaxOp<T>>(reader);
}

FASTMAML_INSTANTIATE_OP(make_softmax)

}  // namespace fastmaml
