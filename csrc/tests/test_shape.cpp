// Rearranging, gathering and combining arrays against plain loops.
#include "check.h"
#include "cpu/program_layout.h"

namespace {

using namespace fastmaml_test;
using fastmaml::Moving;
using fastmaml::Rearrangement;

template <typename T>
void check_rearrange(const Kernels<T>& k, Index examples, Index in_size, Index out_size, Index run,
                     Index apart) {
  std::vector<std::int32_t> map(out_size);
  for (Index i = 0; i < out_size; ++i) {
    const Index place = 2 * out_size + i / run * 37 + i % run * apart;
    map[i] = i / run % 5 == 4 ? -1 : static_cast<std::int32_t>(place % in_size);
  }
  const Rearrangement arranged = fastmaml::rearrangement(map, in_size);
  const auto in = random_values<T>(examples * in_size);
  const auto start = random_values<T>(examples * out_size);
  std::vector<double> expected(start.size()), kept(start.size()), sum(start.size());
  for (Index i = 0; i < examples * out_size; ++i) {
    const std::int32_t from = map[i % out_size];
    expected[i] = from < 0 ? 0 : in[i / out_size * in_size + from];
    kept[i] = from < 0 ? start[i] : expected[i];
    sum[i] = static_cast<T>(start[i] + static_cast<T>(expected[i]));
  }
  const std::string name = std::string(k.isa) + " " + scalar_name<T>() + " rearranging of " +
                           std::to_string(run) + " by " + std::to_string(apart);
  const auto check = [&](std::vector<T> out, Moving how, const std::vector<double>& results) {
    check_shares(&out, name,
                 [&](Share s) { k.rearrange(examples, arranged, in.data(), out.data(), how, s); });
    check_close(out, results, 0, name);
  };
  check(poisoned<T>(examples * out_size), Moving::kWrite, expected);
  check(start, Moving::kWriteLeavingGaps, kept);
  check(start, Moving::kAdd, sum);
}

template <typename T>
void check_gather_sums(const Kernels<T>& k, Index examples, Index in_size, Index out_size) {
  std::vector<std::int32_t> starts{0}, places;
  for (Index i = 0; i < out_size; ++i) {
    for (Index j = 0; j < i % 4; ++j) {
      places.push_back(static_cast<std::int32_t>((i * 7 + j * 5) % in_size));
    }
    starts.push_back(static_cast<std::int32_t>(places.size()));
  }
  const auto in = random_values<T>(examples * in_size);
  const auto start = random_values<T>(examples * out_size);
  std::vector<double> expected(start.size()), added(start.size());
  for (Index i = 0; i < examples * out_size; ++i) {
    for (std::int32_t at = starts[i % out_size]; at < starts[i % out_size + 1]; ++at) {
      expected[i] += in[i / out_size * in_size + places[at]];
    }
    added[i] = expected[i] + start[i];
  }
  const std::string name = std::string(k.isa) + " " + scalar_name<T>() + " gather_sums";
  const auto check = [&](std::vector<T> out, bool accumulate, const std::vector<double>& sums) {
    check_shares(&out, name, [&](Share s) {
      k.gather_sums(examples, in_size, out_size, starts.data(), places.data(), in.data(),
                    out.data(), accumulate, s);
    });
    check_close(out, sums, 8, name, 1);
  };
  check(poisoned<T>(examples * out_size), false, expected);
  check(start, true, added);
}

template <typename T>
void check_combinations(const Kernels<T>& k, Index count) {
  const auto x = random_values<T>(count), y = random_values<T>(count),
             start = random_values<T>(count);
  std::vector<double> sum(count), scaled(count), plain(count), rated(count);
  for (Index i = 0; i < count; ++i) {
    scaled[i] = 0.75 * static_cast<double>(x[i]);
    sum[i] = scaled[i] - 1.25 * static_cast<double>(y[i]) + start[i];
    plain[i] = x[i] - 0.5 * static_cast<double>(y[i]);
    rated[i] = x[i] - 0.5 * static_cast<double>(start[i]) * y[i];
  }
  const std::string name =
      std::string(k.isa) + " " + scalar_name<T>() + " combine " + std::to_string(count);
  std::vector<T> out = poisoned<T>(count);
  check_shares(&out, name, [&](Share s) {
    k.axpby(count, T(0.75), x.data(), T(9), nullptr, out.data(), false, s);
  });
  check_close(out, scaled, 4, name + " scaled");
  out = start;
  check_shares(&out, name, [&](Share s) {
    k.axpby(count, T(0.75), x.data(), T(-1.25), y.data(), out.data(), true, s);
  });
  check_close(out, sum, 4, name + " sum", 1);
  out = poisoned<T>(count);
  check_shares(&out, name, [&](Share s) {
    k.update(count, T(-0.5), nullptr, x.data(), y.data(), out.data(), s);
  });
  check_close(out, plain, 4, name + " update", 1);
  check_shares(&out, name, [&](Share s) {
    k.update(count, T(-0.5), start.data(), x.data(), y.data(), out.data(), s);
  });
  check_close(out, rated, 4, name + " update with rates", 1);
}

struct TestShape {
  template <typename T>
  void operator()(const Kernels<T>& k) const {
    for (const Index examples : {1, 3, 5}) {
      for (const Index run : {1, 3, 16, 21}) {
        for (const Index apart : {1, 5, -2}) check_rearrange(k, examples, 48, 83, run, apart);
      }
      check_gather_sums(k, examples, 48, 83);
    }
    for (const Index count : {1, 15, 16, 64, 777}) check_combinations(k, count);
  }
};

}  // namespace

int main() {
  for_each_table(TestShape());
  return report("shape");
}
