// Episodes: who is drawn, and the images in one pass from where they are kept to the batch.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/thread_pool.h"
#include "fastmaml/core.h"
#include "fastmaml/philox.h"

namespace fastmaml {

namespace {

constexpr int kTurns = 4;

void check(const EpisodeArgs& args) {
  const auto require = [](bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
  };
  require(args.ways > 0 && args.shots >= 0 && args.queries >= 0 && args.tasks > 0,
          "ways and tasks must be at least 1, shots and queries not negative");
  const bool as_classes = args.rotations == Rotations::kAsClasses;
  require(args.ways <= args.classes * (as_classes ? kTurns : 1),
          "ways must be at most the number of classes");
  require(args.rotations == Rotations::kNone || args.store.turned != nullptr,
          "turned must be given where classes are rotated");
  const Index bytes = args.store.element_bytes;
  require(args.store.values != nullptr ? bytes == 1 : bytes == 2 || bytes == 4 || bytes == 8,
          "images must be bytes with values to look up, or elements of 2, 4 or 8 bytes");
  for (Index i = 0; i < args.classes; ++i) {
    if (args.counts[i] >= args.shots + args.queries) continue;
    throw std::invalid_argument("class " + std::to_string(i) + " has " +
                                std::to_string(args.counts[i]) +
                                " images, fewer than shots + queries");
  }
}

// out[i] = convert(x[where i shows]) over one channel.
template <typename In, typename Out, typename Convert>
void put_plane(Index n, const In* x, const std::int32_t* from, Out* __restrict out,
               Convert convert) {
  if (from == nullptr) {
    for (Index i = 0; i < n; ++i) out[i] = convert(x[i]);
  } else {
    for (Index i = 0; i < n; ++i) out[i] = convert(x[from[i]]);
  }
}

const std::int32_t* turned(const ImageStore& store, Index turns) {
  return turns == 0 ? nullptr : store.turned + turns * store.plane;
}

template <typename T>
void put_elements(const ImageStore& store, Index image, Index turns, void* batch, Index place) {
  const Index size = store.channels * store.plane;
  const T* x = static_cast<const T*>(store.images) + image * size;
  T* out = static_cast<T*>(batch) + place * size;
  for (Index at = 0; at < size; at += store.plane) {
    put_plane(store.plane, x + at, turned(store, turns), out + at, [](T value) { return value; });
  }
}

// Whether the table is a multiplication, which vectors do faster than look-ups.
bool is_linear(const float* values) {
  for (int i = 0; i < 256; ++i) {
    if (values[i] != static_cast<float>(i) * values[1]) return false;
  }
  return true;
}

void put_bytes(const ImageStore& store, Index image, Index turns, void* batch, Index place) {
  const Index size = store.channels * store.plane;
  const auto* x = static_cast<const std::uint8_t*>(store.images) + image * size;
  float* out = static_cast<float*>(batch) + place * size;
  for (Index c = 0; c < store.channels; ++c, x += store.plane, out += store.plane) {
    const float* values = store.values + (store.values_per_channel ? c * 256 : 0);
    if (is_linear(values)) {
      put_plane(
          store.plane, x, turned(store, turns), out,
          [factor = values[1]](std::uint8_t value) { return static_cast<float>(value) * factor; });
    } else {
      put_plane(store.plane, x, turned(store, turns), out,
                [values](std::uint8_t value) { return values[value]; });
    }
  }
}

void put_image(const ImageStore& store, Index image, Index turns, void* batch, Index place) {
  if (store.values != nullptr) {
    put_bytes(store, image, turns, batch, place);
  } else if (store.element_bytes == 2) {
    put_elements<std::uint16_t>(store, image, turns, batch, place);
  } else if (store.element_bytes == 4) {
    put_elements<std::uint32_t>(store, image, turns, batch, place);
  } else {
    put_elements<std::uint64_t>(store, image, turns, batch, place);
  }
}

// One task after the other, in memory of their own.
class TaskDrawer {
 public:
  explicit TaskDrawer(const EpisodeArgs& args)
      : args_(args),
        classes_(args.ways),
        turns_(args.ways),
        images_(args.ways * (args.shots + args.queries)),
        sorted_(static_cast<std::size_t>(std::max(args.ways, args.shots + args.queries))) {}

  void draw(Index task) {
    TaskWords words(args_.seed, args_.batch, static_cast<std::uint32_t>(args_.first_task + task));
    const bool as_classes = args_.rotations == Rotations::kAsClasses;
    const Index population = args_.classes * (as_classes ? kTurns : 1);
    for (Index i = 0; i < args_.ways; ++i) {
      classes_[i] = draw_another(words.next(), population, sorted_.data(), static_cast<int>(i));
    }
    for (Index i = 0; i < args_.ways; ++i) {
      const Index turns = below(words.next(), kTurns);
      turns_[i] = args_.rotations == Rotations::kPerClass ? turns : 0;
      if (!as_classes) continue;
      turns_[i] = classes_[i] % kTurns;
      classes_[i] /= kTurns;
    }
    const Index examples = args_.shots + args_.queries;
    for (Index way = 0; way < args_.ways; ++way) {
      const Index* members = args_.members + args_.starts[classes_[way]];
      const Index count = args_.counts[classes_[way]];
      for (Index i = 0; i < examples; ++i) {
        Index& image = images_[way * examples + i];
        image = members[draw_another(words.next(), count, sorted_.data(), static_cast<int>(i))];
        prefetch(image);
      }
    }
    put(task);
  }

 private:
  // The images lie all over the memory: asked for together, they arrive together.
  void prefetch(Index image) const {
    constexpr Index kLine = 64, kAtOnce = 1024;  // the processor itself fetches what follows
    const Index bytes = args_.store.channels * args_.store.plane * args_.store.element_bytes;
    const char* start = static_cast<const char*>(args_.store.images) + image * bytes;
    for (Index at = 0; at < std::min(bytes, kAtOnce); at += kLine) __builtin_prefetch(start + at);
  }

  void put(Index task) const {
    const Index examples = args_.shots + args_.queries;
    for (Index way = 0; way < args_.ways; ++way) {
      for (Index i = 0; i < examples; ++i) {
        const bool support = i < args_.shots;
        const Index per_class = support ? args_.shots : args_.queries;
        const Index place = (task * args_.ways + way) * per_class + (support ? i : i - args_.shots);
        put_image(args_.store, images_[way * examples + i], turns_[way],
                  support ? args_.support_x : args_.query_x, place);
      }
    }
  }

  const EpisodeArgs& args_;
  std::vector<Index> classes_, turns_, images_, sorted_;
};

}  // namespace

void draw_episodes(const EpisodeArgs& args) {
  check(args);
  std::atomic<Index> next{0};
  const auto work = [&](int) {
    TaskDrawer drawer(args);
    for (Index task = next++; task < args.tasks; task = next++) drawer.draw(task);
  };
  if (args.threads <= 1) return work(0);  // beside a meta-step that has the pool
  ThreadPool::instance().run(args.threads, work);
}

}  // namespace fastmaml
