// Products, sums and losses with a task in each lane against plain loops.
#include "check.h"

namespace {

using namespace fastmaml_test;
using fastmaml::LaneMatrix;
using fastmaml::LaneProduct;
using fastmaml::LaneProducts;
using fastmaml::Loss;

// A matrix [rows][columns] of vectors, or of numbers that all lanes share; perhaps transposed.
template <typename T>
class Operand {
 public:
  Operand(Index rows, Index columns, int lanes, bool transposed, bool shared)
      : lanes_(shared ? 1 : lanes), values_(random_values<T>(rows * columns * lanes_)) {
    matrix_ = {values_.data(), transposed ? 1 : columns, transposed ? rows : 1, shared};
  }
  const LaneMatrix<T>& matrix() const { return matrix_; }
  double at(Index i, Index j, int lane) const {
    const Index element = i * matrix_.row + j * matrix_.column;
    return values_[element * lanes_ + (matrix_.shared ? 0 : lane)];
  }

 private:
  int lanes_;
  std::vector<T> values_;
  LaneMatrix<T> matrix_;
};

struct Shape {
  Index rows, columns, depth, depth2;  // depth2 0: one product
};

template <typename T>
void check_products(const Kernels<T>& k, const Shape& s, bool transposed, bool shared, bool base,
                    bool rates) {
  const Operand<T> a(s.rows, s.depth, k.lanes, transposed, false);
  const Operand<T> b(s.depth, s.columns, k.lanes, !transposed, shared);
  const Operand<T> a2(s.rows, s.depth2, k.lanes, !transposed, false);
  const Operand<T> b2(s.depth2, s.columns, k.lanes, transposed, false);
  const Operand<T> c(s.rows, s.columns, k.lanes, transposed, shared);
  const auto scales = random_values<T>(s.rows * (s.columns + 2));
  const T factor = T(-0.3);
  std::vector<T> out = poisoned<T>(s.rows * s.columns * k.lanes);
  const LaneProducts<T> job = {
      s.rows,
      s.columns,
      {{a.matrix(), b.matrix(), s.depth}, {a2.matrix(), b2.matrix(), s.depth2}},
      s.depth2 > 0 ? 2 : 1,
      base ? c.matrix() : LaneMatrix<T>{},
      factor,
      rates ? scales.data() : nullptr,
      s.columns + 2,
      out.data()};
  k.lane_products(job);
  std::vector<double> expected;
  for (Index i = 0; i < s.rows; ++i) {
    for (Index j = 0; j < s.columns; ++j) {
      for (int lane = 0; lane < k.lanes; ++lane) {
        double sum = 0;
        for (Index d = 0; d < s.depth; ++d) sum += a.at(i, d, lane) * b.at(d, j, lane);
        for (Index d = 0; d < s.depth2; ++d) sum += a2.at(i, d, lane) * b2.at(d, j, lane);
        sum *= factor * (rates ? static_cast<double>(scales[i * (s.columns + 2) + j]) : 1);
        expected.push_back(sum + (base ? c.at(i, j, lane) : 0));
      }
    }
  }
  check_close(out, expected, 40,
              std::string("products ") + k.isa + " " + scalar_name<T>() + " " +
                  std::to_string(s.rows) + "x" + std::to_string(s.depth) + "x" +
                  std::to_string(s.columns) + (shared ? " shared" : ""),
              1);
}

// The result may lie where the base does.
template <typename T>
void check_in_place(const Kernels<T>& k) {
  const Index rows = 7, columns = 9, depth = 3;
  const Operand<T> a(rows, depth, k.lanes, false, false), b(depth, columns, k.lanes, false, false);
  auto base = random_values<T>(rows * columns * k.lanes);
  std::vector<T> apart = poisoned<T>(rows * columns * k.lanes);
  LaneProducts<T> job = {rows,
                         columns,
                         {{a.matrix(), b.matrix(), depth}},
                         1,
                         {base.data(), columns, 1},
                         T(0.5),
                         nullptr,
                         0,
                         apart.data()};
  k.lane_products(job);
  job.out = base.data();
  k.lane_products(job);
  check(base == apart, std::string("in place ") + k.isa);
}

template <typename T>
void check_sums(const Kernels<T>& k, Index count, int tasks, bool second, bool accumulate) {
  auto a = random_values<T>(count * k.lanes);
  const auto b = random_values<T>(count * k.lanes);
  std::vector<T> out = accumulate ? random_values<T>(count) : poisoned<T>(count);
  std::vector<double> expected;
  for (Index i = 0; i < count; ++i) {
    double sum = 0;
    for (int l = 0; l < tasks; ++l) {
      sum += static_cast<double>(a[i * k.lanes + l]) * (second ? b[i * k.lanes + l] : T(1));
    }
    for (int l = tasks; l < k.lanes; ++l) a[i * k.lanes + l] = static_cast<T>(NAN);
    expected.push_back(-2.5 * sum + (accumulate ? out[i] : 0));
  }
  k.lane_sums(count, tasks, T(-2.5), a.data(), second ? b.data() : nullptr, out.data(), accumulate);
  check_close(out, expected, 40,
              std::string("sums ") + k.isa + " " + scalar_name<T>() + " " + std::to_string(count) +
                  " of " + std::to_string(tasks),
              1);
}

// Against the kernel for one task, lane by lane.
template <typename T>
void check_losses(const Kernels<T>& k, Loss kind, Index rows, Index columns) {
  const bool labels = kind == Loss::kCrossEntropy;
  const Index ld = fastmaml::padded(columns, k.lanes), size = rows * columns;
  const auto y = random_values<T>(size * k.lanes, 3), dy = random_values<T>(size * k.lanes);
  auto targets = random_values<T>(size * k.lanes);
  std::vector<T> gy = poisoned<T>(size * k.lanes), dgy = gy, losses = poisoned<T>(k.lanes);
  const auto at = [&](Index i, Index c, int lane) { return (i * columns + c) * k.lanes + lane; };
  const auto label = [&](Index i, int lane) { return (3 * i + lane) % columns; };
  for (Index i = 0; labels && i < rows; ++i) {
    for (int l = 0; l < k.lanes; ++l) {
      for (Index c = 0; c < columns; ++c) targets[at(i, c, l)] = c == label(i, l) ? T(1) : T(0);
    }
  }
  k.lane_loss_gradient(kind, rows, columns, y.data(), targets.data(), gy.data(), losses.data());
  k.lane_loss_tangent(kind, rows, columns, y.data(), dy.data(), dgy.data());
  const std::string name = std::string(labels ? "cross-entropy " : "squared error ") + k.isa + " " +
                           scalar_name<T>() + " " + std::to_string(rows) + "x" +
                           std::to_string(columns);
  for (int lane = 0; lane < k.lanes; ++lane) {
    std::vector<T> own_y(rows * ld), own_dy(rows * ld), own_gy(rows * ld), own_dgy(rows * ld),
        own_t;
    std::vector<std::int64_t> own_labels;
    std::vector<T> got, got_tangent;
    for (Index i = 0; i < rows; ++i) {
      own_labels.push_back(label(i, lane));
      for (Index c = 0; c < columns; ++c) {
        own_y[i * ld + c] = y[at(i, c, lane)];
        own_dy[i * ld + c] = dy[at(i, c, lane)];
        own_t.push_back(targets[at(i, c, lane)]);
        got.push_back(gy[at(i, c, lane)]);
        got_tangent.push_back(dgy[at(i, c, lane)]);
      }
    }
    const double loss = k.loss_gradient(kind, rows, columns, own_y.data(), own_labels.data(),
                                        own_t.data(), own_gy.data());
    k.loss_tangent(kind, rows, columns, own_y.data(), own_dy.data(), own_dgy.data());
    std::vector<double> expected, expected_tangent;
    for (Index i = 0; i < rows; ++i) {
      for (Index c = 0; c < columns; ++c) {
        expected.push_back(own_gy[i * ld + c]);
        expected_tangent.push_back(own_dgy[i * ld + c]);
      }
    }
    check_close(std::vector<T>{losses[lane]}, {loss}, 60, name, 1);
    check_close(got, expected, 60, name + " gradient", 1.0 / static_cast<double>(rows));
    check_close(got_tangent, expected_tangent, 60, name + " tangent",
                1.0 / static_cast<double>(rows));
  }
}

struct Test {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const Shape& s : {Shape{1, 1, 1, 0}, Shape{10, 40, 1, 0}, Shape{5, 7, 13, 4},
                           Shape{6, 4, 3, 0}, Shape{13, 9, 2, 5}, Shape{40, 1, 10, 0}}) {
      for (const bool transposed : {false, true}) {
        for (const bool shared : {false, true}) {
          check_products(k, s, transposed, shared, false, false);
          check_products(k, s, transposed, shared, true, true);
        }
      }
    }
    check_in_place(k);
    for (const Index count : {1, 7, 16, 45}) {
      check_sums(k, count, k.lanes, false, false);
      check_sums(k, count, k.lanes / 2 + 1, true, true);
    }
    for (const Loss kind : {Loss::kCrossEntropy, Loss::kMeanSquaredError}) {
      check_losses(k, kind, 1, 1);
      check_losses(k, kind, 4, 5);
      check_losses(k, kind, 7, 19);
    }
  }
};

}  // namespace

int main() {
  for_each_table(Test());
  return report("lanes");
}
