// Knows no instruction set, so that plans can be made of it.
#pragma once

#include <cstdint>

namespace fastmaml {

// A row of one matrix and the row of another it is multiplied with.
struct RowPair {
  std::int32_t a, b;
};

}  // namespace fastmaml
