// The factors of a product, or of a sum of two.
#pragma once

namespace fastmaml {

// Up to two pairs of factors; pairs with a null (zero) factor drop out.
template <typename T>
struct Pairs {
  const T* a[2] = {nullptr, nullptr};
  const T* b[2] = {nullptr, nullptr};
  int count = 0;

  Pairs() = default;
  Pairs(const T* a1, const T* b1, const T* a2, const T* b2) {
    add(a1, b1);
    add(a2, b2);
  }
  explicit operator bool() const { return count > 0; }

 private:
  void add(const T* left, const T* right) {
    if (left == nullptr || right == nullptr) return;
    a[count] = left;
    b[count++] = right;
  }
};

}  // namespace fastmaml
