// Batch normalisation, of each task by its own batch or by given statistics.
#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

// What all norms have in common: gamma and beta, where their gradients go, and the statistics.
template <typename T>
class AffineOp : public Op<T> {
 public:
  explicit AffineOp(OpReader& reader) {
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
  }

  void reserve(const Kernels<T>& kernels, BatchPlan<T>& batch, OpPlaces& places) const override {
    const Index width = padded(channels_, kernels.lanes);
    places.saved = {batch.reserve_value(width), batch.reserve_value(width),
                    batch.reserve_value(width)};
    places.gradient = {batch.reserve_gradient(width), batch.reserve_gradient(width)};
    places.tangent = {batch.reserve_tangent(width)};
  }

 protected:
  Index rows(const Run<T>& run) const { return run.examples() * positions_; }
  int input() const { return this->inputs[0]; }
  int gamma() const { return this->slots[0]; }
  int beta() const { return this->slots[1]; }

  T* inv_std(const Run<T>& run) const { return saved(run, 0); }
  T* mean(const Run<T>& run) const { return saved(run, 1); }
  T* variance(const Run<T>& run) const { return saved(run, 2); }
  T* mean_dx_xhat(const Run<T>& run) const { return tangent_of(run, 0); }

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

  // One row of `stats`: means and unbiased variances.
  void write_batch_statistics(const Run<T>& run, T* stats) const {
    const Index count = rows(run);
    const T unbias = count > 1 ? static_cast<T>(count) / static_cast<T>(count - 1) : T(1);
    for (Index c = 0; c < channels_; ++c) {
      stats[c] = mean(run)[c];
      stats[channels_ + c] = variance(run)[c] * unbias;
    }
  }

  T* saved(const Run<T>& run, int which) const {
    return run.values + this->places(run).saved[which];
  }
  T* tangent_of(const Run<T>& run, int which) const {
    return run.tangents + this->places(run).tangent[which];
  }

  Index channels_ = 0;
  Index positions_ = 1;
  T eps_ = 0;

 private:
  void add_to(Run<T>& run, const T* sums, Target<T> target) const {
    if (!target) return;
    run.kernels.axpby(padded(channels_, run.kernels.lanes), T(1), sums, T(0), nullptr, target.data,
                      target.accumulate, run.share);
  }
};

// A norm that keeps x-hat, where nobody else reads the input in its place.
template <typename T>
class NormOp : public AffineOp<T> {
 public:
  explicit NormOp(OpReader& reader) : AffineOp<T>(reader) {
    const Layout layout = channels_first(reader.input(0), reader.lanes());
    const Place place = reader.need(0, layout, Padding::kRequired);
    overwrites_input_ = reader.may_overwrite(0, place);
    this->inputs = {place.storage};
    this->output = reader.produce(layout);
  }

  void reserve(const Kernels<T>& kernels, BatchPlan<T>& batch, OpPlaces& places) const override {
    AffineOp<T>::reserve(kernels, batch, places);
    const Index size = batch.examples * this->positions_ * padded(this->channels_, kernels.lanes);
    const int x = this->inputs[0];
    places.saved.push_back(overwrites_input_ ? batch.value[x] : batch.reserve_value(size));
    places.tangent.push_back(batch.reserve_tangent(size));
  }

 protected:
  T* xhat(const Run<T>& run) const { return this->saved(run, 3); }
  T* dxhat(const Run<T>& run) const { return this->tangent_of(run, 1); }

 private:
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
    this->write_batch_statistics(run, stats);
  }

 private:
  bool tracking_;
};

// Batch norm, ReLU and max-pooling in one pass each way: only the pooled values are kept, and x.
template <typename T>
class NormReluOp final : public AffineOp<T> {
 public:
  explicit NormReluOp(OpReader& reader)
      : AffineOp<T>(reader), tracking_(reader.flag("tracking")), window_(reader.fused_window()) {
    const Shape& x = reader.input(0);
    height_ = x.size() == 3 ? x[1] : 1;
    width_ = this->positions_ / height_;
    const Place place = reader.need(0, channels_first(x, reader.lanes()), Padding::kRequired);
    this->inputs = {place.storage};
    if (reader.may_overwrite(0, place)) reader.give_way(place);
    reader.keep(place);
    this->output = reader.produce(channels_first(reader.fused_output(), reader.lanes()));
  }

  void reserve(const Kernels<T>& kernels, BatchPlan<T>& batch, OpPlaces& places) const override {
    AffineOp<T>::reserve(kernels, batch, places);
    const Index width = padded(this->channels_, kernels.lanes);
    const Index outputs = (height_ / window_) * (width_ / window_);
    if (window_ > 1) places.saved.push_back(batch.reserve_value(batch.examples * outputs * width));
    places.tangent.push_back(batch.reserve_tangent(width));
  }

  void forward(Run<T>& run) const override {
    run.kernels.norm_relu_forward(shape(run), state(run), this->eps_, run.share);
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const Target<T> gx = run.into(flow, this->input());
    run.kernels.norm_relu_backward(shape(run), state(run), run.arrived(flow, this->output), gx.data,
                                   gx.accumulate, this->gamma_sums(run, flow),
                                   this->beta_sums(run, flow), run.share);
    this->store_sums(run, flow);
  }

  void tangent(Run<T>& run) const override {
    run.kernels.norm_relu_tangent(shape(run), state(run), moved(run), run.direction(this->beta()),
                                  run.tangent_out(this->output), run.share);
  }

  void backward_tangent(Run<T>& run) const override {
    const Target<T> dgx = run.into(run.second, this->input());
    run.kernels.norm_relu_backward_tangent(
        shape(run), state(run), moved(run), run.gradient(this->output),
        run.arrived(run.second, this->output), this->gamma_sums(run, run.first),
        this->beta_sums(run, run.first), dgx.data, dgx.accumulate,
        this->gamma_sums(run, run.second), this->beta_sums(run, run.second), run.share);
    this->store_sums(run, run.second);
  }

  Index stats_size() const override { return tracking_ ? 2 * this->channels_ : 0; }
  void write_stats(const Run<T>& run, T* stats) const override {
    this->write_batch_statistics(run, stats);
  }

 private:
  NormReluShape shape(const Run<T>& run) const {
    return {run.examples(), height_, width_, window_, this->channels_};
  }
  NormReluState<T> state(const Run<T>& run) const {
    return {run.value(this->input()),    run.weight(this->gamma()),
            run.weight(this->beta()),    this->mean(run),
            this->variance(run),         this->inv_std(run),
            run.value_out(this->output), window_ == 1 ? nullptr : this->saved(run, 3)};
  }
  NormReluTangent<T> moved(const Run<T>& run) const {
    return {run.tangent(this->input()), run.direction(this->gamma()), this->tangent_of(run, 1),
            this->mean_dx_xhat(run)};
  }

  bool tracking_;
  Index window_, height_ = 1, width_ = 1;
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
  if (reader.fused_window() > 0) return std::make_unique<NormReluOp<T>>(reader);
  if (reader.flag("training")) return std::make_unique<BatchStatisticsNormOp<T>>(reader);
  return std::make_unique<GivenStatisticsNormOp<T>>(reader);
}

FASTMAML_INSTANTIATE_OP(make_batch_norm)

}  // namespace fastmaml
