// The GPU's sampler, compiled for the host, against the CPU's: to the last bit.
#include <stdexcept>

#include "check.h"
#include "fastmaml/device.h"

namespace {

using namespace fastmaml_test;
using fastmaml::DeviceKernels;
using fastmaml::EpisodeBatch;
using fastmaml::EpisodeDrawer;
using fastmaml::EpisodeSpec;
using fastmaml::Pixel;
using fastmaml::Rotations;
using fastmaml::Stream;

constexpr Index kChannels = 2, kSide = 5, kPlane = kSide * kSide, kSize = kChannels * kPlane;
constexpr std::uint64_t kSeed = 0xfedcba9876543210u, kBatch = 0x1fffffffeu;

const DeviceKernels& device() { return *fastmaml::emulated_kernels(); }

template <typename In, typename Out>
struct Problem {
  std::vector<In> images;
  std::vector<Index> members, starts = {0, 6, 10}, counts = {6, 4, 9};
  std::vector<double> factors = {0.3, -1.7}, shifts = {0.1, 5};
  std::vector<Out> device_factors, device_shifts;
  EpisodeSpec spec;

  Problem(Pixel pixel, Rotations rotations, bool scaled) {
    for (Index i = 0; i < 19; ++i) members.push_back(i * 7 % 19);
    for (const double x : random_values<double>(19 * kSize, 100)) {
      images.push_back(static_cast<In>(std::fabs(x)));
    }
    for (double& x : factors) x = static_cast<double>(static_cast<Out>(x));
    for (double& x : shifts) x = static_cast<double>(static_cast<Out>(x));
    device_factors.assign(factors.begin(), factors.end());
    device_shifts.assign(shifts.begin(), shifts.end());
    spec.store = {images.data(), pixel, kChannels, kPlane, nullptr, nullptr};
    if (scaled) {
      spec.store.factors = factors.data();
      spec.store.shifts = shifts.data();
    }
    spec.members = members.data();
    spec.counts = counts.data();
    spec.classes = 3;
    spec.ways = rotations == Rotations::kAsClasses ? 11 : 3;
    spec.shots = 1;
    spec.queries = 3;
    spec.tasks = 7;
    spec.rotations = rotations;
    spec.first_task = 14;
  }

  EpisodeBatch batch(std::vector<Out>* support, std::vector<Out>* query) const {
    EpisodeBatch args;
    args.images = images.data();
    args.pixel = spec.store.pixel;
    args.channels = kChannels;
    args.plane = kPlane;
    args.factors = spec.store.factors == nullptr ? nullptr : device_factors.data();
    args.shifts = spec.store.factors == nullptr ? nullptr : device_shifts.data();
    args.members = members.data();
    args.starts = starts.data();
    args.counts = counts.data();
    args.classes = spec.classes;
    args.ways = spec.ways;
    args.shots = spec.shots;
    args.queries = spec.queries;
    args.tasks = spec.tasks;
    args.rotations = spec.rotations;
    args.first_task = spec.first_task;
    support->assign(spec.tasks * spec.ways * spec.shots * kSize, Out(77));
    query->assign(spec.tasks * spec.ways * spec.queries * kSize, Out(77));
    args.support_x = support->data();
    args.query_x = query->data();
    args.seed = kSeed;
    args.batch = kBatch;
    return args;
  }
};

template <typename In, typename Out>
void check_pixels(Pixel pixel, bool scaled, const std::string& type) {
  for (const Rotations rotations :
       {Rotations::kNone, Rotations::kPerClass, Rotations::kAsClasses}) {
    const Problem<In, Out> problem(pixel, rotations, scaled);
    std::vector<Out> support, query, drawn_support, drawn_query;
    problem.batch(&support, &query);
    EpisodeDrawer(problem.spec).draw(kSeed, kBatch, support.data(), query.data(), 1);
    for (const int threads : {1, 3, 64}) {
      const EpisodeBatch args = problem.batch(&drawn_support, &drawn_query);
      device().draw_episodes(args, Stream{0, 0, threads});
      const std::string name = type + ", rotations " + std::to_string(static_cast<int>(rotations)) +
                               ", " + std::to_string(threads) + " threads";
      check(drawn_support == support, name + ": other support images");
      check(drawn_query == query, name + ": other query images");
    }
  }
}

// A place on the device: each call draws the next batch.
void check_stream_of_batches() {
  const Problem<float, float> problem(Pixel::kFloat, Rotations::kPerClass, false);
  const EpisodeDrawer drawer(problem.spec);
  std::uint64_t place[3] = {kSeed, kBatch, 0};
  std::vector<float> support, query, drawn_support, drawn_query;
  EpisodeBatch args = problem.batch(&drawn_support, &drawn_query);
  problem.batch(&support, &query);
  args.place = place;
  args.seed = args.batch = 0;
  for (std::uint64_t i = 0; i < 3; ++i) {
    device().draw_episodes(args, Stream{0, 0, 2});
    drawer.draw(kSeed, kBatch + i, support.data(), query.data(), 1);
    check(drawn_support == support && drawn_query == query, "another batch from a place");
    check(place[0] == kSeed && place[1] == kBatch + i + 1 && place[2] == 0, "another place");
  }
}

template <typename Change>
void check_refused(const std::string& expected, Change change) {
  const Problem<float, float> problem(Pixel::kFloat, Rotations::kPerClass, true);
  std::vector<float> support, query;
  EpisodeBatch args = problem.batch(&support, &query);
  change(&args);
  try {
    device().draw_episodes(args, Stream());
    fail("accepted: " + expected);
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).find(expected) != std::string::npos,
          "refused with another reason than " + expected + ": " + error.what());
  }
}

void check_errors() {
  check_refused("images must not be null", [](EpisodeBatch* b) { b->images = nullptr; });
  check_refused("starts and counts", [](EpisodeBatch* b) { b->starts = nullptr; });
  check_refused("query_x must not be null", [](EpisodeBatch* b) { b->query_x = nullptr; });
  check_refused("tasks must be at least 1", [](EpisodeBatch* b) { b->tasks = 0; });
  check_refused("fewer than 2**31", [](EpisodeBatch* b) { b->plane = Index{1} << 30; });
  check_refused("must be square", [](EpisodeBatch* b) { b->plane = 24; });
  check_refused("come together", [](EpisodeBatch* b) { b->shifts = nullptr; });
  check_refused("more than a block", [](EpisodeBatch* b) {
    b->tasks = 1;
    b->ways = 100000;
  });
}

}  // namespace

int main() {
  check_pixels<std::uint8_t, float>(Pixel::kByte, true, "bytes");
  check_pixels<float, float>(Pixel::kFloat, false, "floats");
  check_pixels<float, float>(Pixel::kFloat, true, "scaled floats");
  check_pixels<double, double>(Pixel::kDouble, true, "scaled doubles");
  check_pixels<std::uint16_t, std::uint16_t>(Pixel::kTwoBytes, false, "two bytes");
  check_stream_of_batches();
  check_errors();
  return report("cuda_sampler");
}
