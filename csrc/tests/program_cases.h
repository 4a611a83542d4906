// Small programs that together hold every kind of op, in the neighbourhoods that planning treats
// differently: first and last, in place, between layouts, with several consumers, shared
// parameters.
#pragma once

#include <limits>

#include "program_builder.h"

namespace fastmaml_test {

struct ProgramCase {
  std::string name;
  ProgramSpec spec;
  bool classifies = true;  // its output is one row of class scores
  bool smooth = true;      // no maxima, across which differences would step
};

// How far numerical derivatives step, and how good they are then, in roundings.
inline double difference_step(const ProgramCase& c) { return c.smooth ? 1e-4 : 1e-7; }
inline double difference_units(const ProgramCase& c) { return c.smooth ? 1e7 : 1e10; }

inline ProgramSpec mlp(const std::string& function) {
  ProgramBuilder p({3});
  int h = p.activation(p.linear(0, 7), function);
  h = p.activation(p.linear(h, 20), function);
  p.linear(h, 3);
  return p.spec();
}

inline ProgramSpec strided_convnet(const std::string& function, bool training, bool adapt_body,
                                   bool affine) {
  ProgramBuilder p({1, 9, 9});
  p.adapt(adapt_body);
  int h = 0;
  for (int layer = 0; layer < 3; ++layer) {
    h = p.batch_norm(p.conv2d(h, 5, 3, 2), training, affine);
    h = p.activation(h, function);
  }
  p.adapt(true);
  p.linear(p.mean(h, {1, 2}), 4);
  return p.spec();
}

inline ProgramSpec pooled_convnet() {
  ProgramBuilder p({3, 8, 7});
  int h = p.activation(p.batch_norm(p.conv2d(0, 18)), "gelu");
  h = p.max_pool2d(h, 2, 2, 0, {18, 4, 3});
  h = p.conv2d(h, 4, 2, 1, 1, 2);
  h = p.max_pool2d(p.activation(h, "elu"), 3, 2, 1, {4, 2, 2});
  p.linear(p.flatten(h), 3);
  return p.spec();
}

// Blocks that run as one op, on sizes that their windows do not fill; the last keeps no pool.
inline ProgramSpec pooled_blocks(bool affine) {
  ProgramBuilder p({2, 11, 9});
  int h = p.activation(p.batch_norm(p.conv2d(0, 18), true, affine), "relu");
  h = p.max_pool2d(h, 2, 2, 0, {18, 5, 4});
  h = p.activation(p.batch_norm(p.conv2d(h, 4), true, affine), "relu");
  h = p.max_pool2d(h, 2, 2, 0, {4, 2, 2});
  h = p.activation(p.batch_norm(p.conv2d(h, 5), true, affine), "relu");
  p.linear(p.flatten(h), 3);
  return p.spec();
}

// On images: of groups of channels, of all, of each.
inline ProgramSpec group_norms() {
  ProgramBuilder p({2, 6, 5});
  int h = p.activation(p.group_norm(p.conv2d(0, 6), 3, {0}), "tanh");
  h = p.activation(p.group_norm(p.conv2d(h, 4, 3, 2), 1, {0, 1, 2}), "softplus");
  h = p.add(h, p.group_norm(h, 4, {0}, false), 0.5);
  p.linear(p.flatten(h), 3);
  return p.spec();
}

// On rows, one norm with parameters that all tasks share.
inline ProgramSpec layer_norms() {
  ProgramBuilder p({3, 5});
  int h = p.activation(p.group_norm(p.linear(0, 20), 1, {1}), "tanh");
  p.adapt(false);
  h = p.group_norm(p.linear(h, 18), 1, {1});
  p.adapt(true);
  p.linear(p.mean(h, {0}), 3);
  return p.spec();
}

inline ProgramSpec skips_and_rearrangements() {
  ProgramBuilder p({3, 6, 6});
  int h = p.activation(p.conv2d(0, 4), "tanh");
  h = p.activation(p.add(p.conv2d(h, 4), h, 0.7), "silu");
  const int padded_mean = p.avg_pool2d(h, 3, 2, 1, true, {4, 4, 4});
  const int plain_mean = p.avg_pool2d(h, 3, 2, 1, false, {4, 4, 4});
  h = p.add(padded_mean, plain_mean, -1.3);
  h = p.scale(p.add(h, h, 2.0), 0.5, 0.3);
  h = p.adaptive_avg_pool2d(h, 3, 2);
  h = p.activation(p.linear(p.permute(h, {1, 2, 0}), 6), "sigmoid");
  h = p.mean(p.permute(h, {2, 0, 1}), {2});
  p.linear(p.flatten(h), 3);
  return p.spec();
}

inline ProgramSpec tied_weights() {
  ProgramBuilder p({4});
  const int weight = p.slot({4, 4});
  const int bias = p.slot({4});
  int h = 0;
  for (int layer = 0; layer < 3; ++layer) {
    h = p.activation(p.op("linear", {h}, {4}, {weight, bias}, {}), "tanh");
  }
  return p.spec();
}

// The input itself meets a scaling, a norm and, a second time, a convolution; the head is shared.
inline ProgramSpec input_of_many() {
  ProgramBuilder p({2, 5, 5});
  int h = p.batch_norm(p.activation(p.scale(0, 2.0, -0.5), "sin"));
  h = p.add(h, p.conv2d(0, 2, 3, 1, 1, 1, false), 1.0);
  h = p.flatten(p.max_pool2d(h, 3, 2, 1, {2, 3, 3}));
  p.adapt(false);
  p.linear(h, 3);
  return p.spec();
}

// Channels are excited, positions gated by what is read off them; the input gates itself.
inline ProgramSpec gated() {
  ProgramBuilder p({3, 4, 5});
  int h = p.activation(p.conv2d(p.mul(0, p.scale(0, 0.5, 1.0)), 18), "tanh");
  const int channels = p.activation(p.linear(p.linear(p.mean(h, {1, 2}), 3), 18), "sigmoid");
  h = p.mul(h, p.expand(p.view(channels, {18, 1, 1}), {18, 4, 5}));
  const int positions = p.activation(p.conv2d(h, 1), "sigmoid");
  h = p.mul(p.expand(positions, {18, 4, 5}), h);
  h = p.mean(p.mul(h, h), {1, 2});
  const int centre = p.view(p.mean(h, {0}), {1});
  p.linear(p.add(h, p.expand(centre, {18}), -1.0), 3);
  return p.spec();
}

// Images grow by what is made of them; both halves of a layer's outputs go on, one twice.
inline ProgramSpec joined_and_parted() {
  ProgramBuilder p({2, 4, 3});
  int h = p.activation(p.conv2d(0, 17), "tanh");
  h = p.cat({h, 0, p.conv2d(p.cat({0, h}, 0), 3)}, 0);
  h = p.cat({h, p.narrow(h, 2, 1, 2)}, 2);
  h = p.activation(p.linear(p.mean(p.narrow(h, 0, 2, 19), {1, 2}), 20), "tanh");
  const int low = p.narrow(h, 0, 0, 10), high = p.activation(p.narrow(h, 0, 10, 10), "sigmoid");
  p.linear(p.cat({p.mul(low, high), low, low}, 0), 3);
  return p.spec();
}

// Five places look at each other through two heads, by scores that are no whole vector. Norms,
// which write over what nobody else reads, leave the softmax before them as it is.
inline ProgramSpec attention() {
  ProgramBuilder p({5, 3});
  const auto heads = [&](int x) { return p.permute(p.view(p.linear(x, 6), {5, 2, 3}), {1, 0, 2}); };
  const int queries = heads(0), keys = heads(0), values = heads(0);
  const int scores = p.scale(p.bmm(queries, p.permute(keys, {0, 2, 1})), 0.6, 0.0);
  const int weights = p.softmax(scores, 2), log_weights = p.softmax(scores, 2, true);
  const int entropy = p.bmm(p.mul(weights, log_weights), values);
  int h = p.add(p.bmm(weights, values), entropy, 0.3);
  h = p.view(p.permute(h, {1, 0, 2}), {5, 6});
  h = p.bmm(p.group_norm(p.softmax(h, 1), 1, {1}), p.permute(h, {1, 0}));
  h = p.add(h, p.batch_norm(p.softmax(h, 0, true)), 0.1);
  p.softmax(p.linear(p.mean(h, {0}), 3), 0, true);
  return p.spec();
}

// Numbers between 0 and 3 and two tables, one of all tasks.
inline ProgramSpec embeddings() {
  ProgramBuilder p({3, 4});
  const int part = p.activation(p.narrow(0, 0, 1, 2), "sigmoid");
  const int numbers = p.scale(part, 3.0, 0.0);
  int h = p.view(p.permute(p.embedding(numbers, 4, 5), {1, 0, 2}), {4, 10});
  p.adapt(false);
  const int shared = p.embedding(p.view(p.permute(numbers, {1, 0}), {8}), 4, 5);
  p.adapt(true);
  h = p.add(h, p.view(shared, {4, 10}), 0.5);
  p.linear(p.cat({p.activation(p.linear(p.flatten(h), 9), "tanh"), p.flatten(part)}, 0), 3);
  return p.spec();
}

// Functions that are not finite in padding, between products that would take it along.
inline ProgramSpec singular_functions() {
  ProgramBuilder p({3});
  const auto positive = [&](int x) { return p.scale(p.activation(x, "square"), 0.1, 2.0); };
  int h = p.activation(positive(p.linear(0, 7)), "log");
  h = p.add(h, p.activation(positive(h), "rsqrt"), 1.0);
  h = p.mul(p.linear(h, 5), p.activation(positive(p.linear(h, 5)), "reciprocal"));
  h = p.mul(h, p.expand(p.activation(p.view(p.mean(positive(h), {0}), {1}), "length"), {5}));
  p.linear(p.activation(positive(h), "sqrt"), 3);
  return p.spec();
}

// Weights that lie as their transposes do, of all tasks and of each.
inline ProgramSpec swapped_weights() {
  ProgramBuilder p({3, 4, 5});
  int h = p.activation(p.swapped(p.conv2d(0, 17)), "tanh");
  h = p.mean(p.activation(p.swapped(p.conv2d(h, 4, 3, 2, 1, 1, false)), "tanh"), {1, 2});
  p.adapt(false);
  h = p.activation(p.swapped(p.linear(h, 5)), "tanh");
  p.adapt(true);
  p.swapped(p.linear(p.swapped(p.linear(h, 18)), 3));
  return p.spec();
}

// Mirrored edges, every other pixel, neighbours twice; of what is left out nothing comes back.
inline ProgramSpec taken() {
  ProgramBuilder p({3, 4, 5});
  const auto places = [](Index count, Index elements, Index step) {
    std::vector<Index> found(count);
    for (Index i = 0; i < count; ++i) found[i] = i % 9 == 4 ? -1 : i * step % elements;
    return found;
  };
  int h = p.activation(p.conv2d(p.take(0, {3, 6, 7}, places(126, 60, 7)), 17), "tanh");
  h = p.take(h, {4, 2, 9}, places(72, 17 * 6 * 7, 5));
  h = p.take(p.activation(p.conv2d(h, 2), "tanh"), {19}, places(19, 36, 4));
  h = p.linear(p.take(h, {2, 10}, places(20, 19, 3)), 3);
  p.take(p.view(h, {6}), {3}, {5, 0, 5});
  return p.spec();
}

// Leaky units written with masks of values, in two layouts; scores that masks of the input and of
// values rule out, some twice.
inline ProgramSpec masks() {
  ProgramBuilder p({3, 4, 5});
  const auto leaky = [&](int x) {
    const int above = p.activation(x, "is_positive"), rest = p.scale(above, -1.0, 1.0);
    return p.add(p.masked_fill(x, rest, 0.0), p.masked_fill(p.scale(x, 0.2, 0.0), above, 0.0), 1.0);
  };
  const int h = p.mean(leaky(p.conv2d(0, 17)), {1, 2});
  const int low = p.activation(p.scale(p.view(0, {60}), -1.0, -0.7), "is_positive");
  const double nothing = -std::numeric_limits<double>::infinity();
  int scores = p.masked_fill(p.linear(h, 6), p.narrow(low, 0, 4, 6), nothing);
  scores = p.masked_fill(scores, p.activation(p.linear(h, 6), "is_positive"), nothing);
  const int shares = p.softmax(p.cat({scores, p.linear(h, 2)}, 0), 0);
  p.linear(leaky(p.linear(shares, 5)), 3);
  return p.spec();
}

// Only the second branch reaches the output; an image comes out.
inline ProgramSpec dead_branch() {
  ProgramBuilder p({2, 4, 4});
  const int h = p.activation(p.conv2d(0, 3), "tanh");
  p.batch_norm(h);
  p.conv2d(h, 2);
  return p.spec();
}

inline std::vector<ProgramCase> program_cases() {
  return {
      {"mlp", mlp("tanh")},
      {"strided", strided_convnet("tanh", true, true, true)},
      {"given statistics", strided_convnet("tanh", false, true, true)},
      {"plain norm", strided_convnet("softplus", true, true, false)},
      {"shared body", strided_convnet("tanh", true, false, true)},
      {"pooled", pooled_convnet(), true, false},
      {"pooled blocks", pooled_blocks(true), true, false},
      {"pooled blocks without affine", pooled_blocks(false), true, false},
      {"group norms", group_norms()},
      {"layer norms", layer_norms()},
      {"skips", skips_and_rearrangements()},
      {"tied", tied_weights()},
      {"input of many", input_of_many(), true, false},
      {"gated", gated()},
      {"joined and parted", joined_and_parted()},
      {"attention", attention()},
      {"embeddings", embeddings()},
      {"singular functions", singular_functions()},
      {"masks", masks(), true, false},
      {"swapped weights", swapped_weights()},
      {"taken", taken()},
      {"dead branch", dead_branch(), false},
  };
}

}  // namespace fastmaml_test
