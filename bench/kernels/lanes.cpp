// A layer of a small network for as many tasks as a vector has lanes, each with weights of its own:
// task by task, and with a task in each lane.
#include <algorithm>
#include <cstdio>

#include "measure.h"

namespace {

using fastmaml::Index;
using fastmaml::Kernels;
using fastmaml::LaneProducts;
using fastmaml::padded;
using fastmaml::bench::Buffer;
using fastmaml::bench::Ladder;

// The same numbers for task `task` of `tasks`: element i lies at [task][i], or at [i][task].
void spread(Buffer& from, Index tasks, Buffer& lanes) {
  const Index size = from.count() / tasks;
  for (Index task = 0; task < tasks; ++task) {
    for (Index i = 0; i < size; ++i) lanes.data()[i * tasks + task] = from.data()[task * size + i];
  }
}
void gather(Buffer& lanes, Index tasks, Buffer& to) {
  const Index size = to.count() / tasks;
  for (Index task = 0; task < tasks; ++task) {
    for (Index i = 0; i < size; ++i) to.data()[task * size + i] = lanes.data()[i * tasks + task];
  }
}

void climb(const Kernels<float>& k, Index examples, Index in, Index out) {
  const Index tasks = k.lanes, ld = padded(out, k.lanes);
  Buffer x(tasks * examples * in), w(tasks * in * out), y(tasks * examples * out);
  Buffer padded_w(tasks * in * ld), padded_y(tasks * examples * ld);
  Buffer lane_x(x.count()), lane_w(w.count()), lane_y(y.count());
  for (Index i = 0; i < tasks * in; ++i) {
    for (Index o = 0; o < ld; ++o) {
      padded_w.data()[i * ld + o] = o < out ? w.data()[i * out + o] : 0.0f;
    }
  }
  spread(x, tasks, lane_x);
  spread(w, tasks, lane_w);
  std::printf("%lld examples, %lld -> %lld, %lld tasks\n", static_cast<long long>(examples),
              static_cast<long long>(in), static_cast<long long>(out),
              static_cast<long long>(tasks));
  Ladder ladder(k, 2.0 * static_cast<double>(tasks * examples * in * out));
  ladder.rung("dot products", y, [&] {
    for (Index task = 0; task < tasks; ++task) {
      for (Index n = 0; n < examples; ++n) {
        for (Index o = 0; o < out; ++o) {
          float sum = 0;
          for (Index i = 0; i < in; ++i) {
            sum += x.data()[(task * examples + n) * in + i] * w.data()[(task * in + i) * out + o];
          }
          y.data()[(task * examples + n) * out + o] = sum;
        }
      }
    }
  });
  ladder.rung(
      "task by task in register tiles, widths padded", y,
      [&] {
        for (Index task = 0; task < tasks; ++task) {
          k.matmul(examples, in, out, x.data() + task * examples * in, in,
                   padded_w.data() + task * in * ld, nullptr, 0, nullptr, nullptr,
                   padded_y.data() + task * examples * ld, false, {});
        }
      },
      [&] {
        for (Index row = 0; row < tasks * examples; ++row) {
          std::copy_n(padded_y.data() + row * ld, out, y.data() + row * out);
        }
      });
  const LaneProducts<float> job = {
      examples, out, {{{lane_x.data(), in, 1}, {lane_w.data(), out, 1}, in}},
      1,        {},  1.0f,
      nullptr,  0,   lane_y.data()};
  ladder.rung(
      "a task in each lane", y, [&] { k.lane_products(job); }, [&] { gather(lane_y, tasks, y); });
}

}  // namespace

int main() {
  const Kernels<float>& k = fastmaml::kernels<float>();
  climb(k, 10, 1, 40);
  climb(k, 10, 40, 40);
  climb(k, 10, 40, 1);
  climb(k, 25, 17, 7);
  return 0;
}
