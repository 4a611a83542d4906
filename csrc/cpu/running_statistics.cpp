// Running statistics of batch norms, folded outside a program.
#include <cstdint>
#include <stdexcept>
#include <string>

#include "fastmaml/core.h"

namespace fastmaml {

namespace {

template <typename T>
void fold(const FoldArgs& args) {
  const T momentum = static_cast<T>(args.momentum), keep = static_cast<T>(1 - args.momentum);
  const auto* row = static_cast<const T*>(args.rows);
  for (Index call = 0; call < args.calls; ++call) {
    for (const RunningBuffer& buffer : args.buffers) {
      auto* running = static_cast<T*>(buffer.data);
      // from the nearer end: with a momentum of 1 the result is exactly what was reported
      for (Index c = 0; c < buffer.size; ++c) {
        const T change = row[c] - running[c];
        running[c] = momentum < T(0.5) ? running[c] + momentum * change : row[c] - keep * change;
      }
      row += buffer.size;
    }
  }
}

}  // namespace

void fold_statistics(const FoldArgs& args) {
  Index width = 0;
  for (const RunningBuffer& buffer : args.buffers) width += buffer.size;
  if (width != args.width) {
    throw std::invalid_argument("buffers must hold as many values as a row of statistics, got " +
                                std::to_string(width) + " and " + std::to_string(args.width));
  }
  if (args.dtype == DType::kFloat64) {
    fold<double>(args);
  } else {
    fold<float>(args);
  }
  for (std::int64_t* count : args.counts) *count += args.calls;
}

}  // namespace fastmaml
