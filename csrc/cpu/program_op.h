// One operation of a planned program, and what it works on: a task's buffers.
#pragma once

#include <memory>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/program_layout.h"
#include "cpu/program_pairs.h"
#include "cpu/program_parameters.h"
#include "cpu/thread_pool.h"
#include "fastmaml/core.h"

namespace fastmaml {

template <typename T>
class Op;

// Memory that holds one or more values (views and in-place ops share it).
struct Storage {
  Index size = 0;           // elements per example, of the value and of its tangent
  Index gradient_size = 0;  // of its gradient: the input's has padding that the input has not
  Sources depends = 0;      // what the value is a function of
  bool live = false;        // the output has a derivative by it
  // Whoever writes its gradient is the last to read the value, element by element: the gradient may
  // take its place.
  bool gives_way = false;
};

// A buffer among all buffers, as given and with its padding.
struct PackedBuffer {
  Index offset = 0, size = 0, packed = 0;
};

// A program ready to run on any number of examples.
template <typename T>
struct Plan {
  const Kernels<T>* kernels = nullptr;
  std::vector<Storage> storages;  // 0 is the input
  std::vector<std::unique_ptr<Op<T>>> ops;
  std::vector<PackedSlot> slots;
  ParameterGroup theta;
  ParameterGroup phi;
  Index multiplications = 0;  // of a forward pass, per example
  std::vector<PackedBuffer> buffers;
  Index buffers_size = 0;  // with padding
  ProgramSizes sizes;

  int output = 0;
  Index input_size = 0, output_size = 0;      // per example, torch layout
  Index output_rows = 0, output_columns = 0;  // per example, padded rows
  Rearrangement input_from_torch;             // empty: torch's layout as it is
  Rearrangement input_gradient_to_torch, output_to_torch, output_from_torch;
};

// Where the pieces of one op lie in the three regions of a frame, and its convolution plan.
struct OpPlaces {
  std::vector<Index> saved, gradient, tangent;
  std::shared_ptr<const ConvPlan> conv;
};

// The frame of a task with a given number of examples: offsets, in elements, into a region of
// values (and what ops save), one of gradients and one of tangents.
template <typename T>
struct BatchPlan {
  BatchPlan(const Plan<T>& plan, Index examples);

  Index reserve_value(Index count) { return take(value_size, count); }
  Index reserve_gradient(Index count) { return take(least_gradient_size, count); }
  Index reserve_tangent(Index count) { return take(tangent_size, count); }

  Index examples;
  std::vector<Index> value, gradient, tangent;  // by storage
  std::vector<OpPlaces> ops;
  Index value_size = 0;
  // Of gradients, from what every pass needs to what few do: those of values that give way come
  // second to last, the input's last.
  Index least_gradient_size = 0;
  Index gradient_size = 0;
  Index gradient_size_with_input = 0;
  Index tangent_size = 0;

 private:
  static Index take(Index& size, Index count) {
    const Index place = size;
    size += padded(count, 64 / static_cast<int>(sizeof(T)));
    return place;
  }
};

// Where a gradient goes: add to it, or be the first to write it. Null: it is not wanted.
template <typename T>
struct Target {
  T* data = nullptr;
  bool accumulate = false;
  explicit operator bool() const { return data != nullptr; }
};

// An op that multiplies rows of its input, `positions` for each example and lda apart, by a weight
// of its own [in][out].
struct ProductShape {
  Index positions = 0, in = 0, out = 0, lda = 0;  // no positions: it is another kind of op
};

// The matrix [in][out] that is left^T right, of rows [rows][padded(in)] and [rows][padded(out)].
template <typename T>
struct Factors {
  const T* left = nullptr;
  const T* right = nullptr;
  Index rows = 0;
};

// Of a task's weights that are kept in factors, by slot: what the task has beside the weight that
// all tasks share, and the directions in their space. See program_factors.h.
template <typename T>
struct InFactors {
  Weights<T> shared;
  std::vector<char> has;
  std::vector<Factors<T>> moved, directions;
  std::vector<T> products;  // between the two factors, of one thread
};

// Gradients on their way back through the program: of the loss, or (second order) their derivative
// along the tangent. Each thread of a team keeps its own, with the same contents.
template <typename T>
struct Flow {
  T* region = nullptr;
  bool over_values = false;  // gradients take the place of values that give way
  T* theta = nullptr;        // packed gradients
  T* phi = nullptr;
  Sources sources = 0;  // what the gradient is taken with respect to
  std::vector<char> value_written;
  std::vector<char> slot_written;
  std::vector<Pairs<T>> noted;  // by slot, of weights in factors: those of the gradient
};

// One task's run through the program, as one thread of its team sees it.
template <typename T>
class Run {
 public:
  Run(const Plan<T>& plan, const BatchPlan<T>& batch, const TeamMember& member)
      : plan(plan), batch(batch), kernels(*plan.kernels), member(member), share(member.share) {}

  const Plan<T>& plan;
  const BatchPlan<T>& batch;
  const Kernels<T>& kernels;
  TeamMember member;
  Share share;

  T* values = nullptr;
  const T* input = nullptr;
  const T* buffers = nullptr;  // padded
  Weights<T> weights;

  T* tangents = nullptr;
  const T* input_tangent = nullptr;
  Weights<T> directions;
  Sources tangent_sources = 0;  // what has a tangent

  Flow<T> first;   // gradients
  Flow<T> second;  // their tangents

  InFactors<T>* factors = nullptr;  // null: no weight is kept in factors

  bool far = false;  // what other passes left has gone from the core's cache meanwhile

  Index examples() const { return batch.examples; }
  void sync() const { member.sync(); }

  // --- values ---------------------------------------------------------------------------------
  const T* value(int storage) const { return storage == 0 ? input : values + batch.value[storage]; }
  T* value_out(int storage) const { return values + batch.value[storage]; }

  // One that is kept in factors is the one that tasks share.
  const T* weight(int slot) const {
    return slot < 0 ? nullptr : weights_of(slot).value(plan.slots[slot]);
  }
  const T* transposed(int slot) const { return weights_of(slot).transposed(plan.slots[slot]); }
  bool in_factors(int slot) const {
    return factors != nullptr && slot >= 0 && factors->has[slot] != 0;
  }

  // Brings a value, or what has its layout, into the core's cache before a kernel takes it in small
  // pieces. By loads: prefetch instructions had no effect where a page, too, had gone.
  void fetch(const T* data, int storage) const {
    if (!far || data == nullptr) return;
    constexpr Index kLine = 64 / static_cast<Index>(sizeof(T));
    const Range mine = split(examples() * plan.storages[storage].size, share);
    for (Index i = mine.begin; i < mine.end; i += kLine) {
      static_cast<void>(*static_cast<const volatile T*>(data + i));
    }
  }

  // --- tangents: null where zero --------------------------------------------------------------
  bool has_tangent(int storage) const {
    return (plan.storages[storage].depends & tangent_sources) != 0;
  }
  const T* tangent(int storage) const {
    if (!has_tangent(storage)) return nullptr;
    return storage == 0 ? input_tangent : tangents + batch.tangent[storage];
  }
  T* tangent_out(int storage) const { return tangents + batch.tangent[storage]; }

  const T* direction(int slot) const {
    return slot < 0 || in_factors(slot) ? nullptr : directions.value(plan.slots[slot]);
  }
  const T* direction_transposed(int slot) const {
    return direction(slot) == nullptr ? nullptr : directions.transposed(plan.slots[slot]);
  }

  // --- gradients ------------------------------------------------------------------------------
  void reset(Flow<T>& flow) const {
    flow.value_written.assign(plan.storages.size(), 0);
    if (factors == nullptr) {
      flow.slot_written.assign(plan.slots.size(), 0);
    } else {
      flow.slot_written = factors->has;
      flow.noted.assign(plan.slots.size(), {});
    }
  }
  // The gradient that has arrived at a value; null where none has (zero).
  const T* arrived(const Flow<T>& flow, int storage) const {
    return flow.value_written[storage] ? place(flow, storage) : nullptr;
  }
  const T* gradient(int storage) const { return place(first, storage); }

  bool wanted(const Flow<T>& flow, int storage) const {
    return (plan.storages[storage].depends & flow.sources) != 0;
  }
  Target<T> into(Flow<T>& flow, int storage) const {
    if (!wanted(flow, storage)) return {};
    const bool accumulate = flow.value_written[storage];
    flow.value_written[storage] = 1;
    return {place(flow, storage), accumulate};
  }
  T* place(const Flow<T>& flow, int storage) const {
    const bool over = flow.over_values && plan.storages[storage].gives_way;
    return over ? value_out(storage) : flow.region + batch.gradient[storage];
  }
  Target<T> into_slot(Flow<T>& flow, int slot) const {
    if (slot < 0 || (plan.slots[slot].source() & flow.sources) == 0) return {};
    const bool accumulate = flow.slot_written[slot];
    flow.slot_written[slot] = 1;
    return {(plan.slots[slot].adapted ? flow.theta : flow.phi) + plan.slots[slot].packed,
            accumulate};
  }

 private:
  const Weights<T>& weights_of(int slot) const {
    return in_factors(slot) ? factors->shared : weights;
  }
};

// An op reads and writes storages. Its four functions are called by every thread of the team, with
// the team's barrier between two ops. backward serves both flows: where an op's output has no
// tangent, the second-order pass through it is plain backward of the second flow.
template <typename T>
class Op {
 public:
  virtual ~Op() = default;

  virtual void reserve(const Kernels<T>&, BatchPlan<T>&, OpPlaces&) const {}
  virtual void forward(Run<T>& run) const = 0;
  // The output's gradient has arrived in `flow`.
  virtual void backward(Run<T>& run, Flow<T>& flow) const = 0;
  // The output has a tangent: at least one input or parameter has.
  virtual void tangent(Run<T>& run) const = 0;
  // As above, and run.first holds what backward left; the output's second gradient may be zero.
  virtual void backward_tangent(Run<T>& run) const = 0;
  // Of the op's first slot, where it is such an op.
  virtual ProductShape product_shape() const { return {}; }
  // Of a forward pass, per example: where the time goes.
  virtual Index multiplications() const { return 0; }
  // Elements of a statistics row (2 * channels for a tracking norm), and how to fill it.
  virtual Index stats_size() const { return 0; }
  virtual void write_stats(const Run<T>&, T*) const {}

  int index = 0;  // in the plan
  std::vector<int> inputs;
  std::vector<int> slots;
  int output = 0;

 protected:
  const OpPlaces& places(const Run<T>& run) const { return run.batch.ops[index]; }
};

// An op that is linear in its inputs and has no parameters: its tangent is its forward.
template <typename T>
class LinearOp : public Op<T> {
 public:
  void forward(Run<T>& run) const override {
    apply(run, run.value(this->inputs[0]), run.value_out(this->output));
  }
  void tangent(Run<T>& run) const override {
    apply(run, run.tangent(this->inputs[0]), run.tangent_out(this->output));
  }
  void backward_tangent(Run<T>& run) const override {
    if (run.arrived(run.second, this->output) != nullptr) this->backward(run, run.second);
  }

 protected:
  virtual void apply(Run<T>& run, const T* x, T* y) const = 0;
};

// The four passes. Before backward, the gradient of the output must be in the flow; the passes over
// gradients end with every wanted parameter gradient written.
template <typename T>
void run_forward(Run<T>& run);
template <typename T>
void run_backward(Run<T>& run, Flow<T>& flow);
template <typename T>
void run_tangent(Run<T>& run);
template <typename T>
void run_backward_tangent(Run<T>& run);

}  // namespace fastmaml
