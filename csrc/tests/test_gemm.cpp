// Matrix products, column sums and transposition against plain loops.
#include "check.h"

namespace {

using namespace fastmaml_test;
using fastmaml::padded;

template <typename T>
std::string title(const Kernels<T>& kernels, const char* what, Index rows, Index k, Index n) {
  return std::string(what) + " " + kernels.isa + " " + scalar_name<T>() + " " +
         std::to_string(rows) + "x" + std::to_string(k) + "x" + std::to_string(n);
}

template <typename T>
void check_matmul(const Kernels<T>& kernels, Index rows, Index k, Index n, bool dual) {
  const Index ld = padded(n, kernels.lanes), lda = k + 3, lda2 = k + 1;
  const auto a = random_rows<T>(rows, k, lda, true), a2 = random_rows<T>(rows, k, lda2, true);
  const auto b = random_rows<T>(k, n, ld), b2 = random_rows<T>(k, n, ld);
  const auto bias = random_rows<T>(1, n, ld);
  std::vector<T> c = dual ? random_rows<T>(rows, n, ld) : poisoned<T>(rows * ld);
  std::vector<double> expected(c.size(), 0);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < ld; ++j) {
      double sum = dual ? c[i * ld + j] : bias[j];
      for (Index p = 0; p < k; ++p) {
        sum += static_cast<double>(a[i * lda + p]) * b[p * ld + j];
        if (dual) sum += static_cast<double>(a2[i * lda2 + p]) * b2[p * ld + j];
      }
      expected[i * ld + j] = sum;
    }
  }
  const std::string name = title(kernels, dual ? "matmul dual" : "matmul", rows, k, n);
  check_shares(&c, name, [&](Share share) {
    kernels.matmul(rows, k, n, a.data(), lda, b.data(), dual ? a2.data() : nullptr, lda2,
                   dual ? b2.data() : nullptr, dual ? nullptr : bias.data(), c.data(), dual, share);
  });
  check_close(c, expected, 40, name, std::sqrt(static_cast<double>(k)));
}

template <typename T>
void check_matmul_nt(const Kernels<T>& kernels, Index rows, Index k, Index n) {
  const Index ld = padded(n, kernels.lanes), lda = k + 3, ldb = k + 1;
  const auto a = random_rows<T>(rows, k, lda, true), b = random_rows<T>(n, k, ldb, true);
  std::vector<T> c = poisoned<T>(rows * ld);
  std::vector<double> expected(c.size(), 0);
  for (Index i = 0; i < rows; ++i) {
    for (Index j = 0; j < n; ++j) {
      for (Index p = 0; p < k; ++p) {
        expected[i * ld + j] += static_cast<double>(a[i * lda + p]) * b[j * ldb + p];
      }
    }
  }
  const std::string name = title(kernels, "matmul_nt", rows, k, n);
  check_shares(&c, name, [&](Share share) {
    kernels.matmul_nt(rows, k, n, a.data(), lda, b.data(), ldb, c.data(), share);
  });
  check_close(c, expected, 40, name, std::sqrt(static_cast<double>(k)));
}

template <typename T>
void check_matmul_tn(const Kernels<T>& kernels, Index rows, Index k, Index n, bool dual) {
  const Index ld = padded(n, kernels.lanes), lda = k + 2, lda2 = k;
  const auto a = random_rows<T>(rows, k, lda, true), a2 = random_rows<T>(rows, k, lda2, true);
  const auto b = random_rows<T>(rows, n, ld), b2 = random_rows<T>(rows, n, ld);
  std::vector<T> c = dual ? random_rows<T>(k, n, ld) : poisoned<T>(k * ld);
  std::vector<double> expected(c.size(), 0);
  for (Index i = 0; i < k; ++i) {
    for (Index j = 0; j < ld; ++j) {
      double sum = dual ? c[i * ld + j] : 0;
      for (Index p = 0; p < rows; ++p) {
        sum += static_cast<double>(a[p * lda + i]) * b[p * ld + j];
        if (dual) sum += static_cast<double>(a2[p * lda2 + i]) * b2[p * ld + j];
      }
      expected[i * ld + j] = sum;
    }
  }
  const std::string name = title(kernels, dual ? "matmul_tn dual" : "matmul_tn", rows, k, n);
  check_shares(&c, name, [&](Share share) {
    kernels.matmul_tn(rows, k, n, a.data(), lda, b.data(), dual ? a2.data() : nullptr, lda2,
                      dual ? b2.data() : nullptr, c.data(), dual, share);
  });
  check_close(c, expected, 40, name, std::sqrt(static_cast<double>(rows)));
}

template <typename T>
void check_column_sums(const Kernels<T>& kernels, Index rows, Index n, bool accumulate) {
  const Index ld = padded(n, kernels.lanes);
  const auto a = random_rows<T>(rows, n, ld);
  std::vector<T> out = accumulate ? random_rows<T>(1, n, ld) : poisoned<T>(ld);
  std::vector<double> expected(out.size(), 0);
  for (Index j = 0; j < ld; ++j) {
    expected[j] = accumulate ? out[j] : 0;
    for (Index i = 0; i < rows; ++i) expected[j] += a[i * ld + j];
  }
  const std::string name = title(kernels, "column_sums", rows, n, accumulate);
  check_shares(&out, name, [&](Share share) {
    kernels.column_sums(rows, n, a.data(), out.data(), accumulate, share);
  });
  check_close(out, expected, 40, name, std::sqrt(static_cast<double>(rows)));
}

template <typename T>
void check_transpose(const Kernels<T>& kernels, Index taps, Index k, Index n) {
  const Index ld = padded(n, kernels.lanes), ldt = padded(k, kernels.lanes);
  const auto in = random_rows<T>(taps * k, n, ld, true);
  std::vector<T> out = poisoned<T>(taps * n * ldt);
  std::vector<double> expected(out.size(), 0);
  for (Index t = 0; t < taps; ++t) {
    for (Index i = 0; i < k; ++i) {
      for (Index j = 0; j < n; ++j) expected[(t * n + j) * ldt + i] = in[(t * k + i) * ld + j];
    }
  }
  const std::string name = title(kernels, "transpose", taps, k, n);
  check_shares(&out, name,
               [&](Share share) { kernels.transpose(taps, k, n, in.data(), out.data(), share); });
  check_close(out, expected, 0, name);
}

struct TestGemm {
  template <typename T>
  void operator()(const Kernels<T>& kernels) const {
    for (const Index rows : {1, 5, 17, 41, 200}) {
      for (const Index k : {1, 3, 35, 64, 301}) {
        for (const Index n : {1, 3, 17, 18, 33, 48, 65, 100}) {
          for (const bool dual : {false, true}) {
            check_matmul(kernels, rows, k, n, dual);
            check_matmul_tn(kernels, rows, k, n, dual);
          }
          check_matmul_nt(kernels, rows, k, n);
        }
      }
      for (const Index n : {1, 17, 100}) {
        check_column_sums(kernels, rows, n, false);
        check_column_sums(kernels, rows, n, true);
      }
    }
    for (const Index k : {1, 3, 17, 64, 100}) {
      for (const Index n : {1, 5, 16, 48, 100}) check_transpose(kernels, 3, k, n);
    }
  }
};

}  // namespace

int main() {
  for_each_table(TestGemm());
  return report("gemm");
}
