// Losses, their gradients and Hessian-vector products against plain loops.
#include <stdexcept>

#include "check.h"

namespace {

using namespace fastmaml_test;
using fastmaml::Loss;
using fastmaml::padded;

template <typename T>
void check_cross_entropy(const Kernels<T>& k, Index rows, Index columns, double scale) {
  const Index ld = padded(columns, k.lanes);
  auto y = random_rows<T>(rows, columns, ld, true);
  for (T& v : y) v *= static_cast<T>(scale);
  const auto dy = random_rows<T>(rows, columns, ld, true);
  std::vector<std::int64_t> labels(rows);
  std::vector<double> gradient(rows * ld, 0), tangent(rows * ld, 0);
  double loss = 0;
  for (Index i = 0; i < rows; ++i) {
    labels[i] = (7 * i + 3) % columns;
    double highest = y[i * ld], sum = 0, mean = 0;
    for (Index c = 0; c < columns; ++c) highest = std::max<double>(highest, y[i * ld + c]);
    for (Index c = 0; c < columns; ++c) sum += std::exp(y[i * ld + c] - highest);
    const auto p = [&](Index c) { return std::exp(y[i * ld + c] - highest) / sum; };
    for (Index c = 0; c < columns; ++c) mean += p(c) * dy[i * ld + c];
    for (Index c = 0; c < columns; ++c) {
      gradient[i * ld + c] = (p(c) - (c == labels[i])) / static_cast<double>(rows);
      tangent[i * ld + c] = p(c) * (dy[i * ld + c] - mean) / static_cast<double>(rows);
    }
    loss += (highest + std::log(sum) - y[i * ld + labels[i]]) / static_cast<double>(rows);
  }
  const std::string name = std::string(k.isa) + " " + scalar_name<T>() + " cross-entropy " +
                           std::to_string(rows) + "x" + std::to_string(columns);
  std::vector<T> gy = poisoned<T>(rows * ld), value(1);
  value[0] = k.loss_gradient(Loss::kCrossEntropy, rows, columns, y.data(), labels.data(), nullptr,
                             gy.data());
  check_close(value, {loss}, 20 + 10 * scale, name, 1);
  check_close(gy, gradient, 20 + 10 * scale, name + " gradient", 1.0 / static_cast<double>(rows));
  k.loss_tangent(Loss::kCrossEntropy, rows, columns, y.data(), dy.data(), gy.data());
  check_close(gy, tangent, 20 + 10 * scale, name + " tangent", 1.0 / static_cast<double>(rows));

  for (const std::int64_t wrong : {std::int64_t{-1}, std::int64_t{columns}}) {
    labels[rows - 1] = wrong;
    bool thrown = false;
    try {
      k.loss_gradient(Loss::kCrossEntropy, rows, columns, y.data(), labels.data(), nullptr,
                      gy.data());
    } catch (const std::invalid_argument& error) {
      thrown = std::string(error.what()).find(std::to_string(wrong)) != std::string::npos;
    }
    check(thrown, name + " must refuse a label out of range");
  }
}

template <typename T>
void check_squared_error(const Kernels<T>& k, Index rows, Index columns) {
  const Index ld = padded(columns, k.lanes);
  const auto y = random_rows<T>(rows, columns, ld, true),
             dy = random_rows<T>(rows, columns, ld, true);
  const auto values = random_values<T>(rows * columns);
  std::vector<double> gradient(rows * ld, 0), tangent(rows * ld, 0);
  double loss = 0;
  const double count = static_cast<double>(rows * columns);
  for (Index i = 0; i < rows; ++i) {
    for (Index c = 0; c < columns; ++c) {
      const double difference = static_cast<double>(y[i * ld + c]) - values[i * columns + c];
      loss += difference * difference / count;
      gradient[i * ld + c] = 2 * difference / count;
      tangent[i * ld + c] = 2 * dy[i * ld + c] / count;
    }
  }
  const std::string name = std::string(k.isa) + " " + scalar_name<T>() + " squared error";
  std::vector<T> gy = poisoned<T>(rows * ld), value(1);
  value[0] = k.loss_gradient(Loss::kMeanSquaredError, rows, columns, y.data(), nullptr,
                             values.data(), gy.data());
  check_close(value, {loss}, 20 + std::sqrt(count), name);
  check_close(gy, gradient, 20, name + " gradient");
  k.loss_tangent(Loss::kMeanSquaredError, rows, columns, y.data(), dy.data(), gy.data());
  check_close(gy, tangent, 20, name + " tangent");
}

template <typename T>
void check_mean(const Kernels<T>& k, Index rows, Index columns) {
  const Index ld = padded(columns, k.lanes);
  const auto y = random_rows<T>(rows, columns, ld, true);
  const double count = static_cast<double>(rows * columns);
  std::vector<double> gradient(rows * ld, 0);
  double loss = 0;
  for (Index i = 0; i < rows; ++i) {
    for (Index c = 0; c < columns; ++c) {
      loss += y[i * ld + c] / count;
      gradient[i * ld + c] = 1 / count;
    }
  }
  const std::string name = std::string(k.isa) + " " + scalar_name<T>() + " mean";
  std::vector<T> gy = poisoned<T>(rows * ld), value(1);
  value[0] = k.loss_gradient(Loss::kMean, rows, columns, y.data(), nullptr, nullptr, gy.data());
  check_close(value, {loss}, 20 + std::sqrt(count), name, 1);
  check_close(gy, gradient, 20, name + " gradient");
  k.loss_tangent(Loss::kMean, rows, columns, y.data(), y.data(), gy.data());
  check_close(gy, std::vector<double>(rows * ld, 0), 0, name + " tangent");
}

struct TestLoss {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const Index rows : {1, 5, 75}) {
      for (const Index columns : {1, 5, 7, 20, 64}) {
        check_cross_entropy(k, rows, columns, 1);
        check_cross_entropy(k, rows, columns, 50);
        check_squared_error(k, rows, columns);
        check_mean(k, rows, columns);
      }
    }
  }
};

}  // namespace

int main() {
  for_each_table(TestLoss());
  return report("loss");
}
