// Rows of a table, by whole numbers.
#include <algorithm>
#include <limits>

#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

// The table is a vector to the planner, one row behind the other. No gradient goes to the numbers.
template <typename T>
class EmbeddingOp final : public Op<T> {
 public:
  explicit EmbeddingOp(OpReader& reader)
      : rows_(reader.integer("rows", 1)), padding_(reader.integer("padding", -1)) {
    Shape expected = reader.input(0);
    expected.push_back(reader.output().empty() ? 1 : reader.output().back());
    reader.expect_output(expected);
    width_ = expected.back();
    size_ = padded(rows_ * width_, reader.lanes());
    this->slots = {reader.parameter(0, "table", {rows_ * width_}, true)};
    const Place numbers = reader.need_any(0);
    places_ = numbers.layout.offsets;
    example_ = numbers.layout.size();
    this->inputs = {numbers.storage};
    reader.keep(numbers);
    const Layout layout = channels_last(expected, reader.lanes());
    ld_ = layout.ld;
    this->output = reader.produce(layout);
  }

  void forward(Run<T>& run) const override {
    look_up(run, run.weight(this->slots[0]), std::numeric_limits<T>::quiet_NaN(), -1,
            run.value_out(this->output));
  }

  void tangent(Run<T>& run) const override {
    look_up(run, run.direction(this->slots[0]), T(0), padding_, run.tangent_out(this->output));
  }

  // Threads share the columns: a row may be added to by any example.
  void backward(Run<T>& run, Flow<T>& flow) const override {
    const Target<T> table = run.into_slot(flow, this->slots[0]);
    if (!table) return;
    if (!table.accumulate) {
      const Range mine = split(size_, run.share);
      std::fill(table.data + mine.begin, table.data + mine.end, T(0));
      run.sync();
    }
    const T* gy = run.arrived(flow, this->output);
    const Range columns = split(width_, run.share);
    for (Index i = 0; i < numbers(run); ++i) {
      const Index row = row_of(run, i);
      if (row < 0 || row == padding_) continue;
      T* sums = table.data + row * width_ + columns.begin;
      run.kernels.axpby(columns.end - columns.begin, T(1), gy + i * ld_ + columns.begin, T(0),
                        nullptr, sums, true, Share{});
    }
  }

  void backward_tangent(Run<T>& run) const override {
    if (run.arrived(run.second, this->output) != nullptr) backward(run, run.second);
  }

 private:
  Index numbers(const Run<T>& run) const {
    return run.examples() * static_cast<Index>(places_.size());
  }

  // The row that the i-th number is nearest to; -1 where there is none.
  Index row_of(const Run<T>& run, Index i) const {
    const auto count = static_cast<Index>(places_.size());
    const T number = run.value(this->inputs[0])[i / count * example_ + places_[i % count]];
    const bool known = number > T(-0.5) && number < static_cast<T>(rows_) - T(0.5);
    return known ? static_cast<Index>(number + T(0.5)) : -1;
  }

  void look_up(const Run<T>& run, const T* table, T of_no_row, Index skipped, T* out) const {
    const Range mine = split(numbers(run), run.share);
    for (Index i = mine.begin; i < mine.end; ++i) {
      const Index row = table == nullptr ? -1 : row_of(run, i);
      T* to = out + i * ld_;
      if (row < 0 || row == skipped) {
        std::fill(to, to + width_, of_no_row);
      } else {
        std::copy(table + row * width_, table + (row + 1) * width_, to);
      }
      std::fill(to + width_, to + ld_, T(0));
    }
  }

  Index rows_, padding_;
  Index width_ = 0, size_ = 0, ld_ = 0;
  std::vector<std::int32_t> places_;  // of an example's numbers
  Index example_ = 0;
};

}  // namespace

template <typename T>
std::unique_ptr<Op<T>> make_embedding(OpReader& reader) {
  return std::make_unique<EmbeddingOp<T>>(reader);
}

FASTMAML_INSTANTIATE_OP(make_embedding)

}  // namespace fastmaml
