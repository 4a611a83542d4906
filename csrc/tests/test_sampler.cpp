// Random words, draws without replacement, and batches against plain loops.
#include <array>
#include <set>
#include <stdexcept>

#include "check.h"
#include "fastmaml/core.h"

namespace {

using namespace fastmaml_test;
using fastmaml::EpisodeDrawer;
using fastmaml::EpisodeSpec;
using fastmaml::Pixel;
using fastmaml::Rotations;

// tests/kat_vectors of Random123.
void check_known_words() {
  struct Known {
    std::uint32_t counter[4];
    std::uint64_t key;
    std::array<std::uint32_t, 4> words;
  };
  const Known cases[] = {
      {{0, 0, 0, 0}, 0, {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}},
      {{~0u, ~0u, ~0u, ~0u},
       ~std::uint64_t{0},
       {0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}},
      {{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u},
       0x299f31d0a4093822u,
       {0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}},
  };
  for (const Known& known : cases) {
    std::uint32_t words[4];
    fastmaml::philox4x32(known.counter, known.key, words);
    check(std::equal(words, words + 4, known.words.begin()), "philox4x32 differs from Random123");
  }
  fastmaml::TaskWords words(0x299f31d0a4093822u, 0x0370734413198a2eu, 0x85a308d3u);
  const std::uint32_t counter[4] = {2, 0x85a308d3u, 0x13198a2eu, 0x03707344u};
  std::uint32_t expected[4];
  fastmaml::philox4x32(counter, 0x299f31d0a4093822u, expected);
  for (int i = 0; i < 8; ++i) words.next();
  for (const std::uint32_t word : expected) {
    check(words.next() == word, "a task's third block is not that of its counter");
  }
}

// A word that picks `rank` of `left` integers.
std::uint32_t word_for(Index rank, Index left) {
  return static_cast<std::uint32_t>(((static_cast<std::uint64_t>(rank) << 32) + left - 1) / left);
}

void check_draws_without_replacement() {
  constexpr Index kPopulation = 5;
  std::set<std::array<Index, 3>> choices;
  for (Index code = 0; code < 5 * 4 * 3; ++code) {
    const Index ranks[] = {code % 5, code / 5 % 4, code / 20};
    std::vector<Index> left = {0, 1, 2, 3, 4};
    Index sorted[3];
    std::array<Index, 3> choice;
    for (Index i = 0; i < 3; ++i) {
      const std::uint32_t word = word_for(ranks[i], kPopulation - i);
      choice[i] = fastmaml::draw_another(word, kPopulation, sorted, i);
      check(choice[i] == left[ranks[i]], "a draw is not the one of its rank");
      left.erase(left.begin() + ranks[i]);
    }
    choices.insert(choice);
  }
  check(choices.size() == 60, "not every ordered choice is drawn once");
  check(fastmaml::below(~0u, 7) == 6 && fastmaml::below(0, 7) == 0, "an end is not drawn");
}

template <typename T>
void check_scaling(const Kernels<T>& k) {
  for (const Index count : {1, 7, 16, 49, 256, 784}) {
    std::vector<std::uint8_t> bytes(count);
    for (Index i = 0; i < count; ++i) bytes[i] = static_cast<std::uint8_t>(i * 37);
    const auto values = random_values<T>(count);
    // Rounded after either step, however the vectors are.
    volatile T factor = T(0.3), shift = T(-1.7);
    std::vector<double> from_bytes(count), from_values(count);
    for (Index i = 0; i < count; ++i) {
      const volatile T product = static_cast<T>(bytes[i]) * factor, scaled = values[i] * factor;
      from_bytes[i] = static_cast<T>(product + shift);
      from_values[i] = static_cast<T>(scaled + shift);
    }
    const std::string name = std::string(k.isa) + " " + scalar_name<T>();
    std::vector<T> out = poisoned<T>(count);
    k.scale_bytes(count, bytes.data(), factor, shift, out.data());
    check_close(out, from_bytes, 0, name + " scale_bytes");
    out = poisoned<T>(count);
    k.scale(count, values.data(), factor, shift, out.data());
    check_close(out, from_values, 0, name + " scale");
  }
}

// Images of 2 channels of 3 x 3 whose values say image, channel and pixel.
constexpr Index kSide = 3, kPlane = kSide * kSide, kChannels = 2, kSize = kChannels * kPlane;

struct Problem {
  std::vector<double> images;
  std::vector<Index> members, counts = {5, 4, 7};
  EpisodeSpec spec;

  explicit Problem(Rotations rotations) {
    for (Index i = 0; i < 16; ++i) members.push_back((i * 5) % 16);
    for (Index i = 0; i < 16 * kSize; ++i) images.push_back(static_cast<double>(i));
    spec.store = {images.data(), Pixel::kDouble, kChannels, kPlane, nullptr, nullptr};
    spec.members = members.data();
    spec.counts = counts.data();
    spec.classes = 3;
    spec.ways = rotations == Rotations::kAsClasses ? 7 : 3;
    spec.shots = 1;
    spec.queries = 3;
    spec.tasks = 9;
    spec.rotations = rotations;
    spec.first_task = 20;
  }
};

struct Batch {
  std::vector<double> support, query;
  explicit Batch(const EpisodeSpec& spec)
      : support(poisoned<double>(spec.tasks * spec.ways * spec.shots * kSize)),
        query(poisoned<double>(spec.tasks * spec.ways * spec.queries * kSize)) {}
};

// The value a quarter turn at a time, counter-clockwise.
double turned(const Problem& problem, Index image, Index channel, Index row, Index column,
              Index turns) {
  for (; turns > 0; --turns) {
    const Index new_row = column, new_column = kSide - 1 - row;
    row = new_row;
    column = new_column;
  }
  return problem.images[image * kSize + channel * kPlane + row * kSide + column];
}

Index take(std::vector<Index>* left, std::uint32_t word) {
  const auto rank =
      static_cast<std::ptrdiff_t>((static_cast<std::uint64_t>(word) * left->size()) >> 32);
  const Index taken = (*left)[rank];
  left->erase(left->begin() + rank);
  return taken;
}

std::vector<Index> up_to(Index count, Index first = 0) {
  std::vector<Index> values(count);
  for (Index i = 0; i < count; ++i) values[i] = first + i;
  return values;
}

// The specification once more: lists from which what is drawn is taken out.
Batch expected_batch(const Problem& problem, std::uint64_t seed, std::uint64_t batch) {
  const EpisodeSpec& spec = problem.spec;
  Batch expected(spec);
  auto support = expected.support.begin(), query = expected.query.begin();
  const bool as_classes = spec.rotations == Rotations::kAsClasses;
  for (Index task = 0; task < spec.tasks; ++task) {
    fastmaml::TaskWords words(seed, batch, static_cast<std::uint32_t>(spec.first_task + task));
    std::vector<Index> left = up_to(spec.classes * (as_classes ? 4 : 1)), classes, turns;
    for (Index i = 0; i < spec.ways; ++i) classes.push_back(take(&left, words.next()));
    for (Index i = 0; i < spec.ways; ++i) {
      const Index turn = static_cast<Index>(words.next() >> 30);
      turns.push_back(as_classes ? classes[i] % 4
                                 : (spec.rotations == Rotations::kPerClass ? turn : 0));
      if (as_classes) classes[i] /= 4;
    }
    for (Index i = 0; i < spec.ways; ++i) {
      Index start = 0;
      for (Index c = 0; c < classes[i]; ++c) start += problem.counts[c];
      std::vector<Index> members = up_to(problem.counts[classes[i]], start);
      for (Index k = 0; k < spec.shots + spec.queries; ++k) {
        const Index image = problem.members[take(&members, words.next())];
        for (Index at = 0; at < kSize; ++at) {
          const Index pixel = at % kPlane;
          const double value =
              turned(problem, image, at / kPlane, pixel / kSide, pixel % kSide, turns[i]);
          *(k < spec.shots ? support : query)++ = value;
        }
      }
    }
  }
  return expected;
}

void check_batches() {
  for (const Rotations rotations :
       {Rotations::kNone, Rotations::kPerClass, Rotations::kAsClasses}) {
    const Problem problem(rotations);
    const EpisodeDrawer drawer(problem.spec);
    const std::uint64_t seed = 0x9000000000000007u, batch = 0x100000003u;
    const Batch expected = expected_batch(problem, seed, batch);
    for (const int threads : {1, 2, 3, 40}) {
      Batch got(problem.spec);
      drawer.draw(seed, batch, got.support.data(), got.query.data(), threads);
      const std::string name = "rotations " + std::to_string(static_cast<int>(rotations)) + ", " +
                               std::to_string(threads) + " threads";
      check(got.support == expected.support, name + ": other support images");
      check(got.query == expected.query, name + ": other query images");
    }
  }
}

void check_values() {
  Problem problem(Rotations::kPerClass);
  const double factors[] = {0.5, -2}, shifts[] = {3, 0.25};
  problem.spec.store.factors = factors;
  problem.spec.store.shifts = shifts;
  Batch expected = expected_batch(problem, 1, 2), got(problem.spec);
  for (auto* values : {&expected.support, &expected.query}) {
    for (std::size_t i = 0; i < values->size(); ++i) {
      const Index channel = static_cast<Index>(i) % kSize / kPlane;
      (*values)[i] = (*values)[i] * factors[channel] + shifts[channel];
    }
  }
  EpisodeDrawer(problem.spec).draw(1, 2, got.support.data(), got.query.data(), 2);
  check(got.support == expected.support && got.query == expected.query, "other scaled values");
}

template <typename Change>
void check_refused(const std::string& expected, Change change) {
  Problem problem(Rotations::kPerClass);
  change(&problem);
  try {
    const EpisodeDrawer drawer(problem.spec);
    fail("accepted: " + expected);
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).find(expected) != std::string::npos,
          "refused with another reason than " + expected + ": " + error.what());
  }
}

void check_errors() {
  check_refused("ways must be at most", [](Problem* p) { p->spec.ways = 4; });
  check_refused("ways and tasks must be", [](Problem* p) { p->spec.tasks = 0; });
  check_refused("class 1 has 4 images", [](Problem* p) { p->spec.queries = 4; });
  check_refused("must be square", [](Problem* p) { p->spec.store.plane = 8; });
  check_refused("bytes must have factors", [](Problem* p) { p->spec.store.pixel = Pixel::kByte; });
  check_refused("at most 2**32 tasks",
                [](Problem* p) { p->spec.first_task = (Index{1} << 32) - 8; });
  check_refused("two bytes must have no factors", [](Problem* p) {
    p->spec.store.pixel = Pixel::kTwoBytes;
    p->spec.store.factors = p->spec.store.shifts = p->images.data();
  });
}

}  // namespace

int main() {
  check_known_words();
  check_draws_without_replacement();
  for_each_table([](const auto& kernels) { check_scaling(kernels); });
  check_batches();
  check_values();
  check_errors();
  return report("sampler");
}
