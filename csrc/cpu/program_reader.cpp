// Reading the spec of one op.
#include <stdexcept>

#include "cpu/program_ops.h"

namespace fastmaml {

void OpReader::fail(const std::string& message) const {
  throw std::invalid_argument("op " + std::to_string(index_) + " (" + op().kind + "): " + message);
}

template <typename Value>
const Value& OpReader::attribute(const std::string& name, const std::string& type) const {
  const auto found = op().attributes.find(name);
  if (found == op().attributes.end()) fail(name + " is missing");
  const Value* value = std::get_if<Value>(&found->second);
  if (value == nullptr) fail(name + " must be " + type);
  return *value;
}

bool OpReader::has(const std::string& name) const { return op().attributes.count(name) > 0; }

bool OpReader::flag(const std::string& name) const { return attribute<bool>(name, "a bool"); }

double OpReader::number(const std::string& name) const {
  const auto found = op().attributes.find(name);
  if (found != op().attributes.end()) {
    if (const Index* integer = std::get_if<Index>(&found->second)) {
      return static_cast<double>(*integer);
    }
  }
  return attribute<double>(name, "a number");
}

Index OpReader::integer(const std::string& name, Index minimum) const {
  const Index value = attribute<Index>(name, "an int");
  if (value < minimum) {
    fail(name + " must be at least " + std::to_string(minimum) + ", got " + std::to_string(value));
  }
  return value;
}

std::string OpReader::text(const std::string& name) const {
  return attribute<std::string>(name, "a string");
}

std::array<int, 2> OpReader::pair(const std::string& name, int minimum) const {
  const auto& values = attribute<std::vector<Index>>(name, "a pair of ints");
  if (values.size() != 2 || values[0] < minimum || values[1] < minimum) {
    fail(name + " must be a pair of ints, each at least " + std::to_string(minimum) + ", got " +
         to_string(values));
  }
  return {static_cast<int>(values[0]), static_cast<int>(values[1])};
}

Index OpReader::axis(const std::string& name) const {
  const Index value = integer(name, 0);
  if (value >= static_cast<Index>(output().size())) {
    fail(name + " must be an axis of an output of shape " + to_string(output()) + ", got " +
         std::to_string(value));
  }
  return value;
}

const std::vector<Index>& OpReader::integers(const std::string& name) const {
  return attribute<std::vector<Index>>(name, "a tuple of ints");
}

std::vector<Index> OpReader::axes(const std::string& name) const {
  const auto& values = attribute<std::vector<Index>>(name, "a tuple of ints");
  const Index rank = static_cast<Index>(input(0).size());
  std::vector<bool> seen(rank, false);
  for (Index axis : values) {
    if (axis < 0 || axis >= rank || seen[axis]) {
      fail(name + " must be different axes of an input of shape " + to_string(input(0)) + ", got " +
           to_string(values));
    }
    seen[axis] = true;
  }
  return values;
}

void OpReader::expect_inputs(std::size_t count) const {
  if (op().inputs.size() != count) {
    fail("must have " + std::to_string(count) + " inputs, got " +
         std::to_string(op().inputs.size()));
  }
}

const Shape& OpReader::image_input(int i) const {
  const Shape& shape = input(i);
  if (shape.size() != 3) fail("input must have shape [C, H, W], got " + to_string(shape));
  return shape;
}

void OpReader::expect_shape(const std::string& name, const Shape& expected,
                            const Shape& actual) const {
  if (expected != actual) {
    fail(name + " must have shape " + to_string(expected) + ", got " + to_string(actual));
  }
}

void OpReader::expect_output(const Shape& shape) const { expect_shape("output", shape, output()); }

int OpReader::slot_number(int i, const std::vector<int>& numbers, std::size_t count,
                          const std::string& name) const {
  const int number = static_cast<std::size_t>(i) < numbers.size() ? numbers[i] : -1;
  if (number < -1 || number >= static_cast<int>(count)) {
    fail(name + " refers to number " + std::to_string(number) + ", but there are only " +
         std::to_string(count));
  }
  return number;
}

const Shape& OpReader::slot_shape(int i, const std::string& name) const {
  const int slot = slot_number(i, op().params, spec_.slots.size(), name);
  if (slot < 0) fail(name + " is missing");
  return spec_.slots[slot].shape;
}

}  // namespace fastmaml
