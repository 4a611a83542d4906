#include "loss.h"

#include "vector_math.h"

namespace fastmaml {
namespace FASTMAML_ISA {
namespace {

// Writes the softmax of one row and returns the logarithm of its denominator, shift included.
template <typename T>
T softmax(Index columns, const T* y, T* out) {
  T highest = y[0];
  for (Index c = 1; c < columns; ++c) highest = y[c] > highest ? y[c] : highest;
  T sum = 0;
  for (Index c = 0; c < columns; ++c) {
    out[c] = scalar_exp(y[c] - highest);
    sum += out[c];
  }
  for (Index c = 0; c < columns; ++c) out[c] /= sum;
  return highest + scalar_log(sum);
}

template <typename T>
T cross_entropy_gradient(Index rows, Index columns, const T* y, const std::int64_t* labels, T* gy) {
  const Index ld = padded_to_lanes<T>(columns);
  double total = 0;
  for (Index i = 0; i < rows; ++i) {
    const std::int64_t label = labels[i];
    if (label < 0 || label >= columns) throw_label_out_of_range(i, label, columns);
    T* row = gy + i * ld;
    const T log_sum = softmax(columns, y + i * ld, row);
    total += static_cast<double>(log_sum - y[i * ld + label]);
    row[label] -= T(1);
    for (Index c = 0; c < ld; ++c) row[c] = c < columns ? row[c] / static_cast<T>(rows) : T(0);
  }
  return static_cast<T>(total / static_cast<double>(rows));
}

template <typename T>
T squared_error_gradient(Index rows, Index columns, const T* y, const T* values, T* gy) {
  const Index ld = padded_to_lanes<T>(columns);
  const T scale = T(2) / static_cast<T>(rows * columns);
  double total = 0;
  for (Index i = 0; i < rows; ++i) {
    for (Index c = 0; c < columns; ++c) {
      const T difference = y[i * ld + c] - values[i * columns + c];
      total += static_cast<double>(difference) * static_cast<double>(difference);
      gy[i * ld + c] = scale * difference;
    }
    for (Index c = columns; c < ld; ++c) gy[i * ld + c] = 0;
  }
  return static_cast<T>(total / static_cast<double>(rows * columns));
}

template <typename T>
T mean_gradient(Index rows, Index columns, const T* y, T* gy) {
  const Index ld = padded_to_lanes<T>(columns);
  const T share = T(1) / static_cast<T>(rows * columns);
  double total = 0;
  for (Index i = 0; i < rows; ++i) {
    for (Index c = 0; c < columns; ++c) total += static_cast<double>(y[i * ld + c]);
    for (Index c = 0; c < ld; ++c) gy[i * ld + c] = c < columns ? share : T(0);
  }
  return static_cast<T>(total / static_cast<double>(rows * columns));
}

}  // namespace

template <typename T>
T loss_gradient(Loss kind, Index rows, Index columns, const T* y, const std::int64_t* labels,
                const T* values, T* gy) {
  if (kind == Loss::kMean) return mean_gradient(rows, columns, y, gy);
  return kind == Loss::kCrossEntropy ? cross_entropy_gradient(rows, columns, y, labels, gy)
                                     : squared_error_gradient(rows, columns, y, values, gy);
}

template <typename T>
void loss_tangent(Loss kind, Index rows, Index columns, const T* y, const T* dy, T* dgy) {
  const Index ld = padded_to_lanes<T>(columns);
  if (kind == Loss::kMean) {
    for (Index i = 0; i < rows * ld; ++i) dgy[i] = 0;
    return;
  }
  for (Index i = 0; i < rows; ++i) {
    const T* d = dy + i * ld;
    T* out = dgy + i * ld;
    if (kind == Loss::kCrossEntropy) {  // p * (dy - <p, dy>) / rows
      softmax(columns, y + i * ld, out);
      T mean = 0;
      for (Index c = 0; c < columns; ++c) mean += out[c] * d[c];
      for (Index c = 0; c < columns; ++c) out[c] *= (d[c] - mean) / static_cast<T>(rows);
    } else {
      for (Index c = 0; c < columns; ++c) out[c] = T(2) / static_cast<T>(rows * columns) * d[c];
    }
    for (Index c = columns; c < ld; ++c) out[c] = 0;
  }
}

#define FASTMAML_INSTANTIATE(T)                                                                 \
  template T loss_gradient<T>(Loss, Index, Index, const T*, const std::int64_t*, const T*, T*); \
  template void loss_tangent<T>(Loss, Index, Index, const T*, const T*, T*);
FASTMAML_INSTANTIATE(float)
FASTMAML_INSTANTIATE(double)

}  // namespace FASTMAML_ISA
}  // namespace fastmaml
