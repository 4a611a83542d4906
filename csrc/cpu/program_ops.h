// What an op is built from, and the constructors of all kinds.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <vector>

#include "cpu/program_op.h"

namespace fastmaml {

// An input as an op finds it.
struct Place {
  int storage = 0;
  Layout layout;
};

enum class Padding {
  kRequired,
  kOptional,  // rows of the network's input, which has none, are fine
};

// Reads one op of a spec, with errors that name the op and the argument, and places its values. An
// op's constructor asks for its parameters and inputs first, then produces its output.
class OpReader {
 public:
  // `last`: the last of the ops that are run as one, `index` where it stands alone.
  OpReader(const ProgramSpec& spec, int index, int last)
      : spec_(spec), index_(index), last_(last) {}
  virtual ~OpReader() = default;

  const OpSpec& op() const { return spec_.ops[index_]; }
  [[noreturn]] void fail(const std::string& message) const;

  // --- attributes -------------------------------------------------------------------------------
  bool flag(const std::string& name) const;
  double number(const std::string& name) const;
  bool has(const std::string& name) const;
  Index integer(const std::string& name, Index minimum) const;
  std::string text(const std::string& name) const;
  std::array<int, 2> pair(const std::string& name, int minimum) const;
  const std::vector<Index>& integers(const std::string& name) const;
  // A per-example axis of the output.
  Index axis(const std::string& name) const;
  // Per-example axes, each at most once.
  std::vector<Index> axes(const std::string& name) const;

  // --- shapes -----------------------------------------------------------------------------------
  void expect_inputs(std::size_t count) const;
  const Shape& input(int i) const { return spec_.values[op().inputs[i]]; }
  const Shape& image_input(int i) const;  // [C, H, W]
  const Shape& output() const { return spec_.values[op().output]; }
  void expect_output(const Shape& shape) const;

  // --- ops that are run together with this one: a ReLU, perhaps a max-pool -----------------------
  const Shape& fused_output() const { return spec_.values[spec_.ops[last_].output]; }
  // Of the max-pool, 1 without one; 0 where the op stands alone.
  Index fused_window() const { return last_ == index_ ? 0 : last_ - index_; }

  // --- slots: -1 where absent --------------------------------------------------------------------
  const Shape& slot_shape(int i, const std::string& name) const;
  virtual int parameter(int i, const std::string& name, const Shape& shape, bool required) = 0;
  // The buffer's place among the padded buffers.
  virtual Index buffer(int i, const std::string& name, const Shape& shape) = 0;
  virtual void need_transposed(int slot, int storage) = 0;

  // --- placing ----------------------------------------------------------------------------------
  virtual int lanes() const = 0;
  // The input in this layout, rearranged where it is not.
  virtual Place need(int input, const Layout& layout, Padding padding) = 0;
  // The input in whatever padded layout it has.
  virtual Place need_any(int input) = 0;
  // Nothing else reads the memory of this input.
  virtual bool may_overwrite(int input, const Place& place) const = 0;
  // Nobody but a batch norm in training mode reads the output.
  virtual bool feeds_batch_statistics() const = 0;
  // The contents of this input must stay as they are.
  virtual void keep(const Place& place) = 0;
  // Nothing but this op reads the input, and its backward pass can write over it.
  virtual void give_way(const Place& place) = 0;
  virtual int produce(const Layout& layout) = 0;
  // An output without derivatives.
  virtual int produce_constant(const Layout& layout) = 0;
  // The output takes the memory of an input, and whoever wrote it must leave it alone.
  virtual int produce_in_place(const Place& place) = 0;

 protected:
  // The number at place i of op().params or op().buffers, checked against what the spec holds.
  int slot_number(int i, const std::vector<int>& numbers, std::size_t count,
                  const std::string& name) const;
  void expect_shape(const std::string& name, const Shape& expected, const Shape& actual) const;

  const ProgramSpec& spec_;
  int index_, last_;

 private:
  template <typename Value>
  const Value& attribute(const std::string& name, const std::string& type) const;
};

template <typename T>
std::unique_ptr<Op<T>> make_linear(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_conv2d(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_grouped_conv2d(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_batch_norm(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_group_norm(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_activation(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_add(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_mul(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_masked_fill(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_take(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_bmm(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_softmax(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_scale(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_detach(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_parameter(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_embedding(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_cat(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_narrow(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_expand(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_max_pool2d(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_avg_pool2d(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_adaptive_avg_pool2d(OpReader& reader);
template <typename T>
std::unique_ptr<Op<T>> make_mean(OpReader& reader);
// Rearranges a storage; the planner inserts these between layouts.
template <typename T>
std::unique_ptr<Op<T>> make_rearrange(int from, const Layout& from_layout, Index from_gradient_ld,
                                      int to, const Layout& to_layout);

#define FASTMAML_INSTANTIATE_OP(maker)                                 \
  template std::unique_ptr<Op<float>> maker<float>(OpReader & reader); \
  template std::unique_ptr<Op<double>> maker<double>(OpReader & reader);

}  // namespace fastmaml
