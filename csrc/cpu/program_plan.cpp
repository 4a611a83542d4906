#include "cpu/program_plan.h"

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <string>

#include "cpu/program_ops.h"

namespace fastmaml {

namespace {

bool is_alias(const OpSpec& op) { return op.kind == "view" || op.kind == "permute"; }

// Readers of each value's data, counted at the value that a chain of views starts from.
struct Readers {
  std::vector<int> root;
  std::vector<int> count;

  explicit Readers(const ProgramSpec& spec) : root(spec.values.size()), count(root.size(), 0) {
    for (std::size_t value = 0; value < root.size(); ++value) root[value] = static_cast<int>(value);
    for (const OpSpec& op : spec.ops) {
      if (is_alias(op)) {
        root[op.output] = root[op.inputs[0]];
      } else {
        for (int value : op.inputs) ++count[root[value]];
      }
    }
    ++count[root[spec.output]];
  }
};

bool holds(const OpSpec& op, const std::string& name, const Attribute& value) {
  const auto found = op.attributes.find(name);
  return found != op.attributes.end() && found->second == value;
}

bool is_relu(const OpSpec& op) {
  return op.kind == "activation" && holds(op, "function", std::string("relu"));
}

// Windows of 2 x 2 that do not overlap, as many as fit.
bool is_halving_max_pool(const ProgramSpec& spec, const OpSpec& op) {
  if (op.kind != "max_pool2d") return false;
  const std::vector<Index> two = {2, 2}, zero = {0, 0}, one = {1, 1};
  const Shape &x = spec.values[op.inputs[0]], &y = spec.values[op.output];
  return holds(op, "kernel", two) && holds(op, "stride", two) && holds(op, "padding", zero) &&
         holds(op, "dilation", one) && x.size() == 3 && y == Shape{x[0], x[1] / 2, x[2] / 2};
}

bool takes_batch_statistics(const OpSpec& op) {
  return op.kind == "batch_norm" && holds(op, "training", true);
}

// The last of the ops from `index` on that run as one: a batch norm in training mode, a ReLU and a
// max-pool, each the only reader of the one before.
int fused_until(const ProgramSpec& spec, const Readers& readers, int index) {
  const auto feeds_only_next = [&](int i) {
    return i + 1 < static_cast<int>(spec.ops.size()) && readers.count[spec.ops[i].output] == 1 &&
           spec.ops[i + 1].inputs == std::vector<int>{spec.ops[i].output};
  };
  if (!takes_batch_statistics(spec.ops[index])) return index;
  if (!feeds_only_next(index) || !is_relu(spec.ops[index + 1])) return index;
  const int relu = index + 1;
  const bool pooled = feeds_only_next(relu) && is_halving_max_pool(spec, spec.ops[relu + 1]);
  return pooled ? relu + 1 : relu;
}

void check_shapes(const ProgramSpec& spec) {
  if (spec.values.empty()) throw std::invalid_argument("values must hold at least the input");
  for (const Shape& shape : spec.values) {
    for (Index size : shape) {
      if (size < 1) {
        throw std::invalid_argument("values must have positive sizes, got " + to_string(shape));
      }
    }
  }
}

void check_graph(const ProgramSpec& spec) {
  check_shapes(spec);
  const int count = static_cast<int>(spec.values.size());
  std::vector<bool> defined(count, false);
  defined[0] = true;
  for (std::size_t i = 0; i < spec.ops.size(); ++i) {
    const OpSpec& op = spec.ops[i];
    const std::string name = "op " + std::to_string(i) + " (" + op.kind + "): ";
    if (op.inputs.empty()) throw std::invalid_argument(name + "inputs must not be empty");
    for (int value : op.inputs) {
      if (value < 0 || value >= count || !defined[value]) {
        throw std::invalid_argument(name + "input value " + std::to_string(value) +
                                    " is not defined by an earlier op");
      }
    }
    if (op.output <= 0 || op.output >= count || defined[op.output]) {
      throw std::invalid_argument(name + "output must be a new value between 1 and " +
                                  std::to_string(count - 1) + ", got " + std::to_string(op.output));
    }
    defined[op.output] = true;
  }
  if (spec.output < 0 || spec.output >= count || !defined[spec.output]) {
    throw std::invalid_argument("output must be a value that an op defines, got " +
                                std::to_string(spec.output));
  }
}

PackedSlot packed_slot(const SlotSpec& spec, int number) {
  if (spec.offset < 0) {
    throw std::invalid_argument("slot " + std::to_string(number) +
                                ": offset must not be negative, got " +
                                std::to_string(spec.offset));
  }
  PackedSlot slot;
  slot.adapted = spec.adapted;
  slot.swapped = spec.swapped;
  slot.offset = spec.offset;
  const Shape& shape = spec.shape;
  if (shape.size() == 2 || shape.size() == 4) {
    slot.out = shape[0];
    slot.in = shape[1];
    slot.taps = shape.size() == 4 ? shape[2] * shape[3] : 1;
  } else {
    slot.out = element_count(shape);
  }
  return slot;
}

template <typename T>
class Planner {
 public:
  Planner(const ProgramSpec& spec, const Kernels<T>& kernels)
      : spec_(spec), readers_(spec), values_(spec.values.size()) {
    plan_.kernels = &kernels;
    for (const SlotSpec& slot : spec.slots) {
      plan_.slots.push_back(packed_slot(slot, static_cast<int>(plan_.slots.size())));
    }
    for (const Shape& shape : spec.buffers) {
      plan_.buffers.push_back({plan_.sizes.buffers, element_count(shape), plan_.buffers_size});
      plan_.sizes.buffers += element_count(shape);
      plan_.buffers_size += padded(element_count(shape), lanes());
    }
  }

  Plan<T> build() {
    place_input();
    for (int i = 0; i < static_cast<int>(spec_.ops.size()); i = add_op(i) + 1) {
    }
    place_output();
    mark_live();
    plan_.theta.build(plan_.slots, true, spec_.theta_size, lanes());
    plan_.phi.build(plan_.slots, false, spec_.shared_size, lanes());
    plan_.sizes.theta = plan_.theta.size();
    plan_.sizes.shared = plan_.phi.size();
    for (const auto& op : plan_.ops) {
      plan_.sizes.stats += op->stats_size();
      plan_.multiplications += op->multiplications();
    }
    return std::move(plan_);
  }

 private:
  class Reader;
  struct Gathered {
    int from;
    std::vector<std::int32_t> offsets;
    Place to;
  };

  int lanes() const { return plan_.kernels->lanes; }

  Index gradient_ld(int storage, const Layout& layout) const {
    return storage == 0 ? padded(layout.channels, lanes()) : layout.ld;
  }

  // The layout that the first op reading the input wants, so that it need not be rearranged.
  Layout preferred_input_layout() const {
    int value = 0;
    int lanes_needed = 1;
    for (const OpSpec& op : spec_.ops) {
      if (op.inputs[0] != value) continue;
      if (op.kind == "conv2d") return channels_first(spec_.values[value], lanes_needed);
      if (op.kind == "linear") return channels_last(spec_.values[value], lanes_needed);
      if (op.kind != "view") lanes_needed = lanes();
      const bool image_op = op.kind == "batch_norm" || op.kind.find("pool") != std::string::npos ||
                            holds(op, "channels", std::vector<Index>{0});
      if (image_op) return channels_first(spec_.values[value], lanes_needed);
      const bool same_order =
          op.kind == "view" || op.kind == "activation" || op.kind == "add" || op.kind == "scale";
      if (!same_order || element_count(spec_.values[op.output]) != element_count(spec_.values[0])) {
        break;
      }
      value = op.output;
    }
    return channels_last(spec_.values[value], lanes_needed);
  }

  void place_input() {
    const Layout layout = preferred_input_layout();
    const Layout dense = dense_layout(spec_.values[0]);
    const Layout gradient = with_ld(layout, padded(layout.channels, lanes()));
    const bool as_it_is = layout.size() == dense.size() && layout.offsets == dense.offsets;
    if (!as_it_is) plan_.input_from_torch = rearrangement(dense, layout);
    plan_.input_gradient_to_torch = rearrangement(gradient, dense);
    plan_.input_size = dense.size();
    plan_.storages.push_back({layout.size(), gradient.size(), kInput});
    kept_.push_back(true);
    values_[0] = Place{0, layout};
  }

  void place_output() {
    const Shape& shape = spec_.values[spec_.output];
    const Layout layout = channels_last(shape, lanes());
    const Layout dense = dense_layout(shape);
    plan_.output = arranged(values_[spec_.output], layout, Padding::kRequired).storage;
    plan_.output_size = dense.size();
    plan_.output_rows = layout.positions;
    plan_.output_columns = layout.channels;
    plan_.output_to_torch = rearrangement(layout, dense);
    plan_.output_from_torch = rearrangement(dense, layout);
  }

  // Returns the last op of the spec that it covers.
  int add_op(int index);

  void add(std::unique_ptr<Op<T>> op) {
    op->index = static_cast<int>(plan_.ops.size());
    plan_.ops.push_back(std::move(op));
  }

  int new_storage(const Layout& layout, Sources depends) {
    plan_.storages.push_back({layout.size(), layout.size(), depends});
    kept_.push_back(false);
    return static_cast<int>(plan_.storages.size()) - 1;
  }

  Place arranged(const Place& from, const Layout& layout, Padding padding) {
    if (from.layout.same_as(layout)) return from;
    const bool alike =
        from.layout.positions == layout.positions && from.layout.channels == layout.channels;
    if (padding == Padding::kOptional && from.storage == 0 && alike &&
        with_ld(from.layout, layout.ld).same_as(layout)) {
      return from;
    }
    for (const Gathered& gathered : gathered_) {
      if (gathered.from == from.storage && gathered.offsets == from.layout.offsets &&
          gathered.to.layout.same_as(layout)) {
        return gathered.to;
      }
    }
    const Place to{new_storage(layout, plan_.storages[from.storage].depends), layout};
    add(make_rearrange<T>(from.storage, from.layout, gradient_ld(from.storage, from.layout),
                          to.storage, layout));
    gathered_.push_back({from.storage, from.layout.offsets, to});
    return to;
  }

  void mark_live() {
    plan_.storages[plan_.output].live = true;
    for (auto op = plan_.ops.rbegin(); op != plan_.ops.rend(); ++op) {
      const Storage& output = plan_.storages[(*op)->output];
      if (!output.live || output.depends == 0) continue;
      for (int storage : (*op)->inputs) plan_.storages[storage].live = true;
    }
  }

  const ProgramSpec& spec_;
  const Readers readers_;
  Plan<T> plan_;
  std::vector<Place> values_;
  std::vector<Gathered> gathered_;
  std::vector<bool> kept_;  // by storage: its contents must stay
};

// Serves the constructor of one op.
template <typename T>
class Planner<T>::Reader final : public OpReader {
 public:
  Reader(Planner& planner, int index)
      : OpReader(planner.spec_, index, fused_until(planner.spec_, planner.readers_, index)),
        planner_(planner) {}

  int last() const { return last_; }

  int parameter(int i, const std::string& name, const Shape& shape, bool required) override {
    const int slot = slot_number(i, op().params, spec_.slots.size(), name);
    if (slot < 0) {
      if (required) fail(name + " is missing");
      return -1;
    }
    expect_shape(name, shape, spec_.slots[slot].shape);
    depends_ |= planner_.plan_.slots[slot].source();
    return slot;
  }

  Index buffer(int i, const std::string& name, const Shape& shape) override {
    const int number = slot_number(i, op().buffers, spec_.buffers.size(), name);
    if (number < 0) fail(name + " is missing, and evaluation mode needs it");
    expect_shape(name, shape, spec_.buffers[number]);
    return planner_.plan_.buffers[number].packed;
  }

  void need_transposed(int slot, int storage) override {
    planner_.plan_.slots[slot].transposed_for |= planner_.plan_.storages[storage].depends;
  }

  int lanes() const override { return planner_.lanes(); }

  Place need(int input, const Layout& layout, Padding padding) override {
    return used(planner_.arranged(value(input), layout, padding));
  }

  Place need_any(int input) override {
    const Layout& layout = value(input).layout;
    const Layout with_padding = with_ld(layout, padded(layout.channels, lanes()));
    return used(planner_.arranged(value(input), with_padding, Padding::kRequired));
  }

  bool may_overwrite(int input, const Place& place) const override {
    const Readers& readers = planner_.readers_;
    return readers.count[readers.root[op().inputs[input]]] == 1 && !planner_.kept_[place.storage];
  }

  bool feeds_batch_statistics() const override {
    if (planner_.readers_.count[op().output] != 1) return false;
    return std::any_of(spec_.ops.begin(), spec_.ops.end(), [&](const OpSpec& next) {
      return takes_batch_statistics(next) && next.inputs[0] == op().output;
    });
  }

  void keep(const Place& place) override { planner_.kept_[place.storage] = true; }

  void give_way(const Place& place) override {
    planner_.plan_.storages[place.storage].gives_way = true;
  }

  int produce(const Layout& layout) override {
    const int storage = planner_.new_storage(layout, depends_);
    planner_.values_[spec_.ops[last_].output] = Place{storage, layout};
    return storage;
  }

  int produce_constant(const Layout& layout) override {
    depends_ = 0;
    return produce(layout);
  }

  int produce_in_place(const Place& place) override {
    keep(place);
    planner_.values_[op().output] = place;
    return place.storage;
  }

 private:
  const Place& value(int input) const { return planner_.values_[op().inputs[input]]; }

  Place used(Place place) {
    depends_ |= planner_.plan_.storages[place.storage].depends;
    return place;
  }

  Planner& planner_;
  Sources depends_ = 0;
};

Layout permuted_output(const OpReader& reader, const Layout& layout) {
  const std::vector<Index> dims = reader.axes("dims");
  if (dims.size() != reader.input(0).size()) {
    reader.fail("dims must name every axis of the input, got " + to_string(dims));
  }
  Shape expected;
  for (Index axis : dims) expected.push_back(reader.input(0)[axis]);
  reader.expect_output(expected);
  return permuted(layout, reader.input(0), dims);
}

template <typename T>
int Planner<T>::add_op(int index) {
  using Maker = std::unique_ptr<Op<T>> (*)(OpReader&);
  static const std::map<std::string, Maker> makers = {
      {"linear", make_linear<T>},
      {"conv2d", make_conv2d<T>},
      {"grouped_conv2d", make_grouped_conv2d<T>},
      {"batch_norm", make_batch_norm<T>},
      {"group_norm", make_group_norm<T>},
      {"activation", make_activation<T>},
      {"max_pool2d", make_max_pool2d<T>},
      {"avg_pool2d", make_avg_pool2d<T>},
      {"adaptive_avg_pool2d", make_adaptive_avg_pool2d<T>},
      {"mean", make_mean<T>},
      {"add", make_add<T>},
      {"mul", make_mul<T>},
      {"masked_fill", make_masked_fill<T>},
      {"bmm", make_bmm<T>},
      {"softmax", make_softmax<T>},
      {"parameter", make_parameter<T>},
      {"embedding", make_embedding<T>},
      {"cat", make_cat<T>},
      {"narrow", make_narrow<T>},
      {"take", make_take<T>},
      {"expand", make_expand<T>},
      {"scale", make_scale<T>},
      {"detach", make_detach<T>},
  };
  Reader reader(*this, index);
  const OpSpec& op = reader.op();
  static const std::set<std::string> joining = {"add", "mul", "masked_fill", "bmm", "cat"};
  if (joining.count(op.kind) == 0) reader.expect_inputs(1);
  if (is_alias(op)) {
    const Place& from = values_[op.inputs[0]];
    if (element_count(reader.output()) != element_count(reader.input(0))) {
      reader.fail("output must have as many elements as the input " + to_string(reader.input(0)) +
                  ", got " + to_string(reader.output()));
    }
    values_[op.output] =
        op.kind == "view" ? from : Place{from.storage, permuted_output(reader, from.layout)};
    return index;
  }
  const auto maker = makers.find(op.kind);
  if (maker == makers.end()) reader.fail("this kind of op is not known");
  add(maker->second(reader));
  return reader.last();
}

}  // namespace

template <typename T>
Plan<T> make_plan(const ProgramSpec& spec, const Kernels<T>& kernels) {
  check_graph(spec);
  return Planner<T>(spec, kernels).build();
}

template Plan<float> make_plan<float>(const ProgramSpec&, const Kernels<float>&);
template Plan<double> make_plan<double>(const ProgramSpec&, const Kernels<double>&);

}  // namespace fastmaml
