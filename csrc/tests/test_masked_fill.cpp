// Numbers in place of what masks cover, against plain loops.
#include <limits>

#include "check.h"

namespace {

using namespace fastmaml_test;

template <typename T>
void check_masked_fill(const Kernels<T>& k, Index count) {
  auto x = random_values<T>(count);
  const auto mask = random_values<T>(count), start = random_values<T>(count);
  std::vector<double> filled(count), added(count), zeros(count);
  for (Index i = 0; i < count; ++i) {
    const bool covered = mask[i] > T(0.5);
    if (covered) x[i] = std::numeric_limits<T>::quiet_NaN();
    filled[i] = covered ? -1.5 : x[i];
    added[i] = filled[i] + start[i];
    zeros[i] = covered ? -1.5 : 0;
  }
  const std::string name =
      std::string(k.isa) + " " + scalar_name<T>() + " masked_fill " + std::to_string(count);
  const auto check = [&](std::vector<T> out, const T* from, bool accumulate,
                         const std::vector<double>& expected) {
    check_shares(&out, name, [&](Share s) {
      k.masked_fill(count, mask.data(), from, T(-1.5), out.data(), accumulate, s);
    });
    check_close(out, expected, 1, name, 1);
  };
  check(poisoned<T>(count), x.data(), false, filled);
  check(start, x.data(), true, added);
  check(poisoned<T>(count), nullptr, false, zeros);
}

struct TestMaskedFill {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const Index count : {1, 15, 16, 64, 777}) check_masked_fill(k, count);
  }
};

}  // namespace

int main() {
  for_each_table(TestMaskedFill());
  return report("masked_fill");
}
