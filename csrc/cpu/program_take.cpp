// Elements of an example in any order, some more than once, some left out.
#include <algorithm>

#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

// By element of the input, the elements of the output that it has become: places[starts[i]] to
// places[starts[i + 1]].
struct Readers {
  std::vector<std::int32_t> starts, places;

  Readers() = default;
  Readers(const std::vector<std::int32_t>& map, Index size) : starts(size + 1, 0) {
    for (std::int32_t from : map) {
      if (from >= 0) ++starts[from + 1];
    }
    for (Index i = 0; i < size; ++i) starts[i + 1] += starts[i];
    places.resize(starts.back());
    std::vector<std::int32_t> next = starts;
    for (std::size_t to = 0; to < map.size(); ++to) {
      if (map[to] >= 0) places[next[map[to]]++] = static_cast<std::int32_t>(to);
    }
  }
};

template <typename T>
class TakeOp final : public LinearOp<T> {
 public:
  explicit TakeOp(OpReader& reader) {
    const Place from = reader.need_any(0);
    const std::vector<std::int32_t> places = map(reader, from.layout);
    forth_ = rearrangement(places, from.layout.size());
    readers_ = Readers(places, from.layout.size());
    this->inputs = {from.storage};
    this->output = reader.produce(usual_layout(reader.output(), reader.lanes()));
  }

  void backward(Run<T>& run, Flow<T>& flow) const override {
    const T* gy = run.arrived(flow, this->output);
    const Target<T> gx = run.into(flow, this->inputs[0]);
    run.kernels.gather_sums(run.examples(), forth_.to_size, forth_.from_size,
                            readers_.starts.data(), readers_.places.data(), gy, gx.data,
                            gx.accumulate, run.share);
  }

 protected:
  void apply(Run<T>& run, const T* x, T* y) const override {
    run.kernels.rearrange(run.examples(), forth_, x, y, Moving::kWrite, run.share);
  }

 private:
  static std::vector<std::int32_t> map(const OpReader& reader, const Layout& from) {
    const std::vector<Index>& places = reader.integers("places");
    const Layout to = usual_layout(reader.output(), reader.lanes());
    if (places.size() != to.offsets.size()) {
      reader.fail("places must be one for each element of the output " +
                  to_string(reader.output()) + ", got " + std::to_string(places.size()));
    }
    std::vector<std::int32_t> map(to.size(), -1);
    for (std::size_t i = 0; i < places.size(); ++i) {
      if (places[i] >= static_cast<Index>(from.offsets.size())) {
        reader.fail("places must be elements of the input " + to_string(reader.input(0)) +
                    ", got " + std::to_string(places[i]));
      }
      if (places[i] >= 0) map[to.offsets[i]] = from.offsets[places[i]];
    }
    return map;
  }

  Rearrangement forth_;
  Readers readers_;
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_take(OpReader& reader) {
  return std::make_unique<TakeOp<T>>(reader);
}

FASTMAML_INSTANTIATE_OP(make_take)

}  // namespace fastmaml
