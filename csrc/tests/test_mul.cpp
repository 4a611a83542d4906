// Products of arrays against plain loops.
#include "check.h"

namespace {

using namespace fastmaml_test;

template <typename T>
void check_multiply(const Kernels<T>& k, Index count) {
  const auto a = random_values<T>(count), b = random_values<T>(count), c = random_values<T>(count),
             d = random_values<T>(count), start = random_values<T>(count);
  std::vector<double> product(count), two(count);
  for (Index i = 0; i < count; ++i) {
    product[i] = static_cast<double>(a[i]) * b[i];
    two[i] = product[i] + static_cast<double>(c[i]) * d[i] + start[i];
  }
  const std::string name =
      std::string(k.isa) + " " + scalar_name<T>() + " multiply " + std::to_string(count);
  std::vector<T> out = poisoned<T>(count);
  check_shares(&out, name, [&](Share s) {
    k.multiply(count, a.data(), b.data(), nullptr, nullptr, out.data(), false, s);
  });
  check_close(out, product, 1, name);
  out = start;
  check_shares(&out, name, [&](Share s) {
    k.multiply(count, a.data(), b.data(), c.data(), d.data(), out.data(), true, s);
  });
  check_close(out, two, 4, name + " added", 1);
}

struct TestMul {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const Index count : {1, 15, 16, 64, 777}) check_multiply(k, count);
  }
};

}  // namespace

int main() {
  for_each_table(TestMul());
  return report("mul");
}
