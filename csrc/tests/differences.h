// Numerical derivatives.
#pragma once

#include <vector>

namespace fastmaml_test {

// f'(0) of a vector-valued f by central differences of fourth order.
template <typename Function>
std::vector<double> central_difference(double step, const Function& f) {
  const std::vector<double> near_plus = f(step), near_minus = f(-step);
  const std::vector<double> far_plus = f(2 * step), far_minus = f(-2 * step);
  std::vector<double> out(near_plus.size());
  for (std::size_t i = 0; i < out.size(); ++i) {
    out[i] = (8 * (near_plus[i] - near_minus[i]) - (far_plus[i] - far_minus[i])) / (12 * step);
  }
  return out;
}

}  // namespace fastmaml_test
