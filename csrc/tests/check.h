// The little that the tests of the core need: checks that go on, random data, comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace fastmaml_test {

using fastmaml::Index;
using fastmaml::Kernels;
using fastmaml::Share;

inline int& failures() {
  static int count = 0;
  return count;
}

inline void fail(const std::string& what) {
  if (++failures() <= 20) std::fprintf(stderr, "FAILED %s\n", what.c_str());
}
inline void check(bool good, const std::string& what) {
  if (!good) fail(what);
}

inline int report(const char* name) {
  std::printf("%s: %s\n", name, failures() == 0 ? "passed" : "FAILED");
  return failures() == 0 ? 0 : 1;
}

// With FASTMAML_FEW_CASES, as an emulator is told, the longest tests take some of their cases.
inline bool few_cases() { return std::getenv("FASTMAML_FEW_CASES") != nullptr; }

inline std::mt19937& generator() {
  static std::mt19937 engine(20240607);
  return engine;
}

// Normal (by Box and Muller): the standard library's distributions differ from one to the other.
inline double random_normal() {
  const double radius = std::sqrt(-2 * std::log((generator()() + 1.0) / 4294967296.0));
  return radius * std::cos(2 * std::acos(-1.0) / 4294967296.0 * generator()());
}

template <typename T>
std::vector<T> random_values(Index count, double scale = 1) {
  std::vector<T> values(static_cast<std::size_t>(count));
  for (T& value : values) value = static_cast<T>(scale * random_normal());
  return values;
}

// [rows][columns] with rows of `ld` elements; what pads them is zero, or random where it may be.
template <typename T>
std::vector<T> random_rows(Index rows, Index columns, Index ld, bool random_padding = false) {
  std::vector<T> values = random_values<T>(rows * ld);
  for (Index i = 0; !random_padding && i < rows; ++i) {
    for (Index c = columns; c < ld; ++c) values[i * ld + c] = 0;
  }
  return values;
}

// Memory that a kernel must overwrite.
template <typename T>
std::vector<T> poisoned(Index count) {
  return std::vector<T>(static_cast<std::size_t>(count), static_cast<T>(NAN));
}

struct Error {
  std::size_t at;
  double size, allowed;
  explicit operator bool() const { return !(size <= allowed); }
};

// The largest error, which must stay below `units` roundings of the largest expected value, or of
// `least_scale` where terms much larger than their sum may cancel.
template <typename T>
Error largest_error(const std::vector<T>& got, const std::vector<double>& expected, double units,
                    double least_scale) {
  Error error{0, 0, 0};
  double scale = least_scale;
  for (std::size_t i = 0; i < got.size() && !std::isnan(error.size); ++i) {
    scale = std::max(scale, std::fabs(expected[i]));
    const double here = std::fabs(static_cast<double>(got[i]) - expected[i]);
    if (here > error.size || std::isnan(here)) error = {i, here, 0};
  }
  error.allowed = units * std::numeric_limits<T>::epsilon() * scale;
  return error;
}

template <typename T>
void check_close(const std::vector<T>& got, const std::vector<double>& expected, double units,
                 const std::string& what, double least_scale = 1e-30) {
  if (got.size() != expected.size()) return fail(what + ": sizes differ");
  const Error error = largest_error(got, expected, units, least_scale);
  if (!error) return;
  fail(what + ": element " + std::to_string(error.at) + " is " + std::to_string(got[error.at]) +
       ", expected " + std::to_string(expected[error.at]));
}

template <typename T>
const char* scalar_name() {
  return sizeof(T) == 4 ? "float" : "double";
}

// Runs a test, a function object templated on the scalar type, with every table; with FASTMAML_ISA
// set, with the one that the core then takes.
template <typename Test>
void for_each_table(Test test) {
  std::vector<std::string> isas = fastmaml::runnable_isas();
  if (std::getenv("FASTMAML_ISA") != nullptr) isas = {fastmaml::kernels<float>().isa};
  for (const std::string& isa : isas) {
    test(fastmaml::kernels_for<float>(isa));
    test(fastmaml::kernels_for<double>(isa));
  }
}

// Runs `call(share)` in one, two and three parts on copies of `outputs`, and checks that the
// results agree to the last bit; leaves the result of one part in `outputs`.
template <typename T, typename Call>
void check_shares(std::vector<T>* output, const std::string& what, Call call) {
  const std::vector<T> before = *output;
  std::vector<T> whole;
  for (int parts = 1; parts <= 3; ++parts) {
    *output = before;
    for (int part = 0; part < parts; ++part) call(Share{part, parts});
    if (parts == 1) whole = *output;
    bool same = true;
    for (std::size_t i = 0; i < whole.size(); ++i) {
      same =
          same && ((*output)[i] == whole[i] || (std::isnan(whole[i]) && std::isnan((*output)[i])));
    }
    check(same, what + ": " + std::to_string(parts) + " parts differ from one");
  }
  *output = whole;
}

}  // namespace fastmaml_test
