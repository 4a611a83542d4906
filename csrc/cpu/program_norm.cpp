// Batch normalisation, of each task by its own batch or by given statistics.
#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

// What training and evaluation have in common: gamma and beta, and where their gradients go.
template <typename T>
class NormOp : public Op<T> {
 public:
  explicit NormOp(OpReader& reader) {
    const Shape& x = reader.input(0);
    if (x.empty() || x.size() > 3) {
      reader.fail("input must have shape [C], [C, L] or [C, H, W], got " + to_string(x));
    }
    reader.expect_output(x);
    channels_ = x[0];
    positions_ = element_count(x) / channels_;
    eps_ = static_cast<T>(reader.number("eps"));
    this->slots = {reader.parameter(0, "weight", {channels_}, false),
                   reader.parameter(1, "bias", {channels_}, false)};
    const Layout layout = channels_first(x, reader.lanes());
    const Place place = reader.need(0, layout, Padding::kRequired);
    overwrites_input_ = reader.may_overwrite(0, place);
    this->inputs = {place.storage};
    this->output = reader.produce(layout);
  }

  void reserve(const Kernels<T>& kernels, BatchPlan<T>& batch, OpPlaces& places) const override {
    const Index width = padded(channels_, kernels.lanes);
    const Index size = batch.examples * positions_ * width;
    const int x = this->inputs[0];
    places.saved = {overwrites_input_ ? batch.value[x] : batch.reserve_value(size),
                    batch.reserve_value(width), batch.reserve_value(width),
                    batch.reserve_value(width)};
    places.gradient = {batch.reserve_gradient(width), batch.reserve_gradient(width)};
    places.tangent = {batch.reserve_tangent(size), batch.reserve_tangent(width)};
  }

 protected:
  Index rows(const Run<T>& run) const { return run.examples() * positions_; }
  int input() const { return this->inputs[0]; }
  int gamma() const { return this->slots[0]; }
  int beta() const { return this->slots[1]; }

  T* xhat(const Run<T>& run) const { return saved(run, 0); }
  T* inv_std(const Run<T>& run) const { return saved(run, 1); }
  T* mean(const Run<T>& run) const { return saved(run, 2); }
  T* variance(const Run<T>& run) const { return saved(run, 3); }
  T* dxhat(const Run<T>& run) const { return run.tangents + this->places(run).tangent[0]; }
  T* mean_dx_xhat(const Run<T>& run) const { return run.tangents + this->places(run).tangent[1]; }

  T* gamma_sums(const Run<T>& run, const Flow<T>& flow) const {
    return flow.region + this->places(run).gradient[0];
  }
  T* beta_sums(const Run<T>& run, const Flow<T>& flow) const {
    return flow.region + this->places(run).gradient[1];
  }

  // The sums stay in the frame, since second order needs them; the slots get a copy.
  void store_sums(Run<T>& run, Flow<T>& flow) const {
    const Target<T> into_gamma = run.into_slot(flow, gamma());
    const Target<T> into_beta = run.into_slot(flow, beta());
    if (!into_gamma && !into_beta) return;
    run.sync();
    add_to(run, gamma_sums(run, flow), into_gamma);
    add_to(run, beta_sums(run, flow), into_beta);
  }

  Index channels_ = 0;
  Index positions_ = 1;
  T eps_ = 0;

 private:
  T* saved(const Run<T>& run, int which) const {
    return run.values + this->places(run).saved[which];
  }
  void add_to(Run<T>& run, const T* sums, Target<T> target) const {
    if (!target) return;
    run.kernels.axpby(padded(channels_, run.kernels.lanes), T(1), sums, T(0), nullptr, target.data,
                      target.accumulate, run.share);
  }

  bool overwrites_input_ = false;
};

template <typename T>
class BatchStatisticsNormOp final : public NormOp<T> {
 public:
  explicit BatchStatisticsNormOp(OpReader& reader)
      : NormOp<T>(reader), tracking_(reader.flag("tracking")) {}

  void forward(Run<T>& run) const override {
    run.kernels.norm_forward(this->rows(run), this->channels_, run.value(this->input()),
                             run.weight(this->gamma()), run.weight(this->beta()), this->eps_,
                             this->xhat(run), run.value_out(this->output), this->mean(run),
                             this->variance(run), this->inv_std(run), run.share);
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const Target<T> gx = run.into(flow, this->input());
    run.kernels.norm_backward(this->rows(run), this->channels_, run.arrived(flow, this->output),
                              this->xhat(run), run.weight(this->gamma()), this->inv_std(run),
                              gx.data, gx.accumulate, this->gamma_sums(run, flow),
                              this->beta_sums(run, flow), run.share);
    this->store_sums(run, flow);
  }

  void tangent(Run<T>& run) const override {
    run.kernels.norm_tangent(this->rows(run), this->channels_, run.tangent(this->input()),
                             this->xhat(run), run.weight(this->gamma()),
                             run.direction(this->gamma()), run.direction(this->beta()),
                             this->inv_std(run), this->dxhat(run), run.tangent_out(this->output),
                             this->mean_dx_xhat(run), run.share);
  }

  void backward_tangent(Run<T>& run) const override {
    const Target<T> dgx = run.into(run.second, this->input());
    run.kernels.norm_backward_tangent(
        this->rows(run), this->channels_, run.gradient(this->output),
        run.arrived(run.second, this->output), this->xhat(run), this->dxhat(run),
        run.weight(this->gamma()), run.direction(this->gamma()), this->inv_std(run),
        this->mean_dx_xhat(run), this->gamma_sums(run, run.first), this->beta_sums(run, run.first),
        dgx.data, dgx.accumulate, this->gamma_sums(run, run.second),
        this->beta_sums(run, run.second), run.share);
    this->store_sums(run, run.second);
  }

  Index stats_size() const override { return tracking_ ? 2 * this->channels_ : 0; }

  void write_stats(const Run<T>& run, T* stats) const override {
    const Index rows = this->rows(run);
    const T unbias = rows > 1 ? static_cast<T>(rows) / static_cast<T>(rows - 1) : T(1);
    for (Index c = 0; c < this->channels_; ++c) {
      stats[c] = this->mean(run)[c];
      stats[this->channels_ + c] = this->variance(run)[c] * unbias;
    }
  }

 private:
  bool tracking_;
};

template <typename T>
class GivenStatisticsNormOp final : public NormOp<T> {
 public:
  explicit GivenStatisticsNormOp(OpReader& reader)
      : NormOp<T>(reader),
        given_mean_(reader.buffer(0, "running_mean", {this->channels_})),
        given_variance_(reader.buffer(1, "running_var", {this->channels_})) {}

  void forward(Run<T>& run) const override {
    run.kernels.norm_eval_forward(this->rows(run), this->channels_, run.value(this->input()),
                                  run.buffers + given_mean_, run.buffers + given_variance_,
                                  this->eps_, run.weight(this->gamma()), run.weight(this->beta()),
                                  this->xhat(run), run.value_out(this->output), this->inv_std(run),
                                  run.share);
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const Target<T> gx = run.into(flow, this->input());
    run.kernels.norm_eval_backward(
        this->rows(run), this->channels_, run.arrived(flow, this->output), this->xhat(run),
        run.weight(this->gamma()), this->inv_std(run), gx.data, gx.accumulate,
        this->gamma_sums(run, flow), this->beta_sums(run, flow), run.share);
    this->store_sums(run, flow);
  }

  void tangent(Run<T>& run) const override {
    run.kernels.norm_eval_tangent(
        this->rows(run), this->channels_, run.tangent(this->input()), this->xhat(run),
        run.weight(this->gamma()), run.direction(this->gamma()), run.direction(this->beta()),
        this->inv_std(run), this->dxhat(run), run.tangent_out(this->output), run.share);
  }

  void backward_tangent(Run<T>& run) const override {
    const Target<T> dgx = run.into(run.second, this->input());
    run.kernels.norm_eval_backward_tangent(
        this->rows(run), this->channels_, run.gradient(this->output),
        run.arrived(run.second, this->output), this->xhat(run), this->dxhat(run),
        run.weight(this->gamma()), run.direction(this->gamma()), this->inv_std(run), dgx.data,
        dgx.accumulate, this->gamma_sums(run, run.second), this->beta_sums(run, run.second),
        run.share);
    this->store_sums(run, run.second);
  }

 private:
  Index given_mean_, given_variance_;  // among the padded buffers
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_batch_norm(OpReader& reader) {
  if (reader.flag("training")) return std::make_unique<BatchStatisticsNormOp<T>>(reader);
  return std::make_unique<GivenStatisticsNormOp<T>>(reader);
}

FASTMAML_INSTANTIATE_OP(make_batch_norm)

}  // namespace fastmaml
