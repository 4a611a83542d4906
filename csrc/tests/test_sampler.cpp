// Episodes: the published random words, draws without replacement, and which image lands where.
#include <set>
#include <stdexcept>

#include "check.h"
#include "fastmaml/core.h"
#include "fastmaml/philox.h"

namespace {

using namespace fastmaml_test;
using fastmaml::EpisodeArgs;
using fastmaml::Index;
using fastmaml::Rotations;
using fastmaml::TaskWords;

constexpr Index kClasses = 6, kPerClass = 5, kSide = 3;

void check_words() {
  TaskWords zeros(0, 0, 0);  // tests/kat_vectors of Random123
  const std::uint32_t published[] = {0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u};
  for (const std::uint32_t word : published) check(zeros.next() == word, "philox words");
  const std::uint64_t key = 0x299f31d0a4093822ull;  // another of them, with its first word as block
  TaskWords other(key, 0x0370734413198a2eull, 0x85a308d3u);
  check(other.next() != published[0], "words depend on the key and the counter");
}

void check_draws() {
  TaskWords words(7, 1, 2);
  for (int round = 0; round < 200; ++round) {
    std::int64_t sorted[8];
    std::set<std::int64_t> drawn;
    for (int i = 0; i < 8; ++i) {
      const std::int64_t value = fastmaml::draw_another(words.next(), 8, sorted, i);
      check(value >= 0 && value < 8, "a draw is in the population");
      drawn.insert(value);
    }
    check(drawn.size() == 8, "draws are all different");
  }
}

// Images of bytes: 8 * image + pixel.
struct Store {
  std::vector<std::uint8_t> bytes;
  std::vector<float> values = std::vector<float>(256);
  std::vector<std::int32_t> turned;
  std::vector<Index> members, starts, counts;

  Store() {
    for (Index i = 0; i < kClasses * kPerClass; ++i) {
      for (int p = 0; p < kSide * kSide; ++p) bytes.push_back(static_cast<std::uint8_t>(8 * i + p));
    }
    for (int i = 0; i < 256; ++i) values[i] = 0.5f * static_cast<float>(i) + 1;
    for (int turn = 0; turn < 4; ++turn) {
      for (int p = 0; p < kSide * kSide; ++p) {
        int h = p / kSide, w = p % kSide;
        for (int k = 0; k < turn; ++k) {
          const int old = h;
          h = w;
          w = kSide - 1 - old;
        }
        turned.push_back(h * kSide + w);
      }
    }
    for (Index c = 0; c < kClasses; ++c) {
      starts.push_back(c * kPerClass);
      counts.push_back(kPerClass);
      for (Index i = 0; i < kPerClass; ++i) members.push_back(c + i * kClasses);
    }
  }
};

EpisodeArgs arguments(const Store& store, std::vector<float>* support, std::vector<float>* query) {
  EpisodeArgs args;
  args.store = {store.bytes.data(), store.values.data(), false, 1, 1,
                kSide * kSide,      store.turned.data()};
  args.members = store.members.data();
  args.starts = store.starts.data();
  args.counts = store.counts.data();
  args.classes = kClasses;
  args.ways = 4;
  args.shots = 2;
  args.queries = 3;
  args.tasks = 7;
  args.seed = 5;
  support->assign(7 * 4 * 2 * kSide * kSide, -1.0f);
  query->assign(7 * 4 * 3 * kSide * kSide, -1.0f);
  args.support_x = support->data();
  args.query_x = query->data();
  return args;
}

void check_batch(Rotations rotations) {
  const Store store;
  std::vector<float> support, query;
  EpisodeArgs args = arguments(store, &support, &query);
  args.rotations = rotations;
  fastmaml::draw_episodes(args);
  const auto lowest = [](const std::vector<float>& x, Index image) {
    const auto* pixels = x.data() + image * kSide * kSide;
    return static_cast<int>((*std::min_element(pixels, pixels + kSide * kSide) - 1) / 0.5f) / 8;
  };
  for (Index task = 0; task < args.tasks; ++task) {
    for (Index way = 0; way < args.ways; ++way) {
      std::set<int> images, classes;
      for (Index i = 0; i < 2; ++i) images.insert(lowest(support, (task * 4 + way) * 2 + i));
      for (Index i = 0; i < 3; ++i) images.insert(lowest(query, (task * 4 + way) * 3 + i));
      for (const int image : images) classes.insert(image % static_cast<int>(kClasses));
      check(images.size() == 5, "support and query images are all different");
      check(classes.size() == 1, "and of one class");
    }
  }
  std::vector<float> again_support, again_query;
  EpisodeArgs again = arguments(store, &again_support, &again_query);
  again.rotations = rotations;
  again.threads = 3;
  fastmaml::draw_episodes(again);
  check(support == again_support && query == again_query, "threads do not matter");
}

void check_refused(const EpisodeArgs& args, const std::string& message) {
  try {
    fastmaml::draw_episodes(args);
    fail("accepted what should say: " + message);
  } catch (const std::invalid_argument& error) {
    check(std::string(error.what()).find(message) != std::string::npos, error.what());
  }
}

void check_errors() {
  const Store store;
  std::vector<float> support, query;
  EpisodeArgs args = arguments(store, &support, &query);
  args.queries = 4;
  check_refused(args, "class 0 has 5 images");
  args = arguments(store, &support, &query);
  args.ways = 7;
  check_refused(args, "ways must be at most");
}

}  // namespace

int main() {
  check_words();
  check_draws();
  for (const auto rotations : {Rotations::kNone, Rotations::kPerClass, Rotations::kAsClasses}) {
    check_batch(rotations);
  }
  check_errors();
  return report("sampler");
}
