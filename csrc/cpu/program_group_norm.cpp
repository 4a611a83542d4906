// Layer, group and instance normalisation, of each example by itself.
#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

template <typename T>
class GroupNormOp final : public Op<T> {
 public:
  explicit GroupNormOp(OpReader& reader)
      : eps_(static_cast<T>(reader.number("eps"))), groups_(reader.integer("groups", 1)) {
    const Layout layout = channel_layout(reader.input(0), channel_axes(reader), reader.lanes());
    channels_ = layout.channels;
    if (channels_ % groups_ != 0) {
      reader.fail("groups must divide the number of channels, " + std::to_string(channels_) +
                  ", got " + std::to_string(groups_));
    }
    positions_ = layout.positions / sets_;
    reader.expect_output(reader.input(0));
    this->slots = {reader.parameter(0, "weight", {channels_}, false),
                   reader.parameter(1, "bias", {channels_}, false)};
    const Place place = reader.need(0, layout, Padding::kRequired);
    overwrites_input_ = reader.may_overwrite(0, place);
    this->inputs = {place.storage};
    this->output = reader.produce(layout);
  }

  void reserve(const Kernels<T>& kernels, BatchPlan<T>& batch, OpPlaces& places) const override {
    const Index sets = batch.examples * sets_, width = padded(channels_, kernels.lanes);
    const Index size = sets * positions_ * width;
    places.saved = {overwrites_input_ ? batch.value[input()] : batch.reserve_value(size),
                    batch.reserve_value(sets * groups_)};
    places.gradient = {batch.reserve_gradient(sets * width), batch.reserve_gradient(sets * width)};
    places.tangent = {batch.reserve_tangent(size), batch.reserve_tangent(sets * groups_)};
  }

  void forward(Run<T>& run) const override {
    run.kernels.group_norm_forward(shape(run), run.value(input()), run.weight(gamma()),
                                   run.weight(beta()), eps_, saved(run, 0),
                                   run.value_out(this->output), saved(run, 1), run.share);
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const Target<T> gx = run.into(flow, input());
    run.kernels.group_norm_backward(shape(run), state(run), run.arrived(flow, this->output),
                                    gx.data, gx.accumulate, sums(run, flow, 0), sums(run, flow, 1),
                                    run.share);
    store_sums(run, flow);
  }

  void tangent(Run<T>& run) const override {
    run.kernels.group_norm_tangent(shape(run), state(run), moved(run), run.tangent(input()),
                                   run.direction(beta()), run.tangent_out(this->output), run.share);
  }

  void backward_tangent(Run<T>& run) const override {
    const Target<T> dgx = run.into(run.second, input());
    run.kernels.group_norm_backward_tangent(
        shape(run), state(run), moved(run), run.gradient(this->output),
        run.arrived(run.second, this->output), sums(run, run.first, 0), sums(run, run.first, 1),
        dgx.data, dgx.accumulate, sums(run, run.second, 0), sums(run, run.second, 1), run.share);
    store_sums(run, run.second);
  }

 private:
  // Marks them, and counts the sets in front of them.
  std::vector<bool> channel_axes(const OpReader& reader) {
    const Shape& x = reader.input(0);
    const std::vector<Index> channels = reader.axes("channels");
    std::vector<bool> marked(x.size(), false);
    for (std::size_t i = 0; i < channels.size(); ++i) {
      marked[channels[i]] = true;
      if (channels[i] != channels[0] + static_cast<Index>(i)) {
        reader.fail("channels must be one axis after the other, got " + to_string(channels));
      }
    }
    for (std::size_t axis = 0; axis < x.size() && !marked[axis]; ++axis) sets_ *= x[axis];
    return marked;
  }

  int input() const { return this->inputs[0]; }
  int gamma() const { return this->slots[0]; }
  int beta() const { return this->slots[1]; }

  GroupNormShape shape(const Run<T>& run) const {
    return {run.examples() * sets_, positions_, channels_, groups_};
  }
  T* saved(const Run<T>& run, int which) const {
    return run.values + this->places(run).saved[which];
  }
  GroupNormState<T> state(const Run<T>& run) const {
    return {run.weight(gamma()), saved(run, 0), saved(run, 1)};
  }
  GroupNormTangent<T> moved(const Run<T>& run) const {
    const std::vector<Index>& places = this->places(run).tangent;
    return {run.direction(gamma()), run.tangents + places[0], run.tangents + places[1]};
  }

  // Of each set, over its positions: of gradients times xhat, and of gradients. They stay in the
  // frame, since second order needs them.
  T* sums(const Run<T>& run, const Flow<T>& flow, int which) const {
    return flow.region + this->places(run).gradient[which];
  }
  void store_sums(Run<T>& run, Flow<T>& flow) const {
    const Target<T> into[2] = {run.into_slot(flow, gamma()), run.into_slot(flow, beta())};
    if (!into[0] && !into[1]) return;
    run.sync();
    for (int i = 0; i < 2; ++i) {
      if (!into[i]) continue;
      run.kernels.column_sums(run.examples() * sets_, channels_, sums(run, flow, i), into[i].data,
                              into[i].accumulate, run.share);
    }
  }

  T eps_;
  Index groups_, channels_ = 0;
  Index sets_ = 1, positions_ = 1;  // per example
  bool overwrites_input_ = false;
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_group_norm(OpReader& reader) {
  return std::make_unique<GroupNormOp<T>>(reader);
}

FASTMAML_INSTANTIATE_OP(make_group_norm)

}  // namespace fastmaml
