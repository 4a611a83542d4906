// Batches of episodes: the images in one pass from where they are kept to where they are wanted.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "fastmaml/core.h"

namespace fastmaml {

namespace {

Index side_of(Index plane) {
  return static_cast<Index>(std::lround(std::sqrt(static_cast<double>(plane))));
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void check(const EpisodeSpec& spec) {
  require(spec.ways > 0 && spec.tasks > 0 && spec.shots >= 0 && spec.queries >= 0 &&
              spec.first_task >= 0,
          "ways and tasks must be at least 1, shots, queries and first_task not negative");
  const bool as_classes = spec.rotations == Rotations::kAsClasses;
  require(spec.ways <= spec.classes * (as_classes ? kQuarterTurns : 1),
          "ways must be at most the number of classes");
  require(spec.first_task + spec.tasks <= Index{1} << 32, "a batch has at most 2**32 tasks");
  const ImageStore& store = spec.store;
  const Index side = side_of(store.plane);
  require(spec.rotations == Rotations::kNone || side * side == store.plane,
          "images must be square where classes are rotated");
  require(store.pixel != Pixel::kByte || store.factors != nullptr, "bytes must have factors");
  require(store.pixel != Pixel::kTwoBytes || store.factors == nullptr,
          "elements of two bytes must have no factors");
  for (Index i = 0; i < spec.classes; ++i) {
    if (spec.counts[i] >= spec.shots + spec.queries) continue;
    throw std::invalid_argument("class " + std::to_string(i) + " has " +
                                std::to_string(spec.counts[i]) +
                                " images, fewer than shots + queries");
  }
}

// The images lie all over the memory: asked for together, they arrive together.
void prefetch(const char* image, Index bytes) {
  constexpr Index kLine = 64, kAtOnce = 1024;  // the processor itself fetches what follows
  for (Index at = 0; at < std::min(bytes, kAtOnce); at += kLine) __builtin_prefetch(image + at);
}

constexpr Index kBlock = 8;  // side of a block of bytes, each row of which is a word

std::uint64_t load_word(const std::uint8_t* p) {
  std::uint64_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

// Swaps the upper half of every group of 2 * kBits bits of `a` with the lower one of `b`'s.
template <int kBits>
void exchange(std::uint64_t& a, std::uint64_t& b) {
  constexpr std::uint64_t kLower = ~std::uint64_t{0} / ((std::uint64_t{1} << kBits) + 1);
  const std::uint64_t difference = (a >> kBits ^ b) & kLower;
  a ^= difference << kBits;
  b ^= difference;
}

void transpose_block(std::uint64_t (&rows)[kBlock]) {
  for (int i = 0; i < 4; ++i) exchange<32>(rows[i], rows[i + 4]);
  for (int i : {0, 1, 4, 5}) exchange<16>(rows[i], rows[i + 2]);
  for (int i = 0; i < kBlock; i += 2) exchange<8>(rows[i], rows[i + 1]);
}

// A quarter turn either way, in blocks: the last ones of a row or column overlap those before.
void turn_bytes(const Turn& turn, Index side, const std::uint8_t* x, std::uint8_t* out) {
  for (Index row = 0; row < side; row += kBlock) {
    const Index top = std::min(row, side - kBlock);
    for (Index column = 0; column < side; column += kBlock) {
      const Index left = std::min(column, side - kBlock);
      const std::uint8_t* from = x + turn.origin + top * turn.down + left * turn.right;
      std::uint64_t rows[kBlock];
      for (Index j = 0; j < kBlock; ++j) {
        const std::uint8_t* line = from + j * turn.right;
        rows[j] = turn.down > 0 ? load_word(line) : __builtin_bswap64(load_word(line - kBlock + 1));
      }
      transpose_block(rows);
      for (Index i = 0; i < kBlock; ++i) {
        std::memcpy(out + (top + i) * side + left, &rows[i], sizeof rows[i]);
      }
    }
  }
}

template <typename T>
void turn_plane(Index turns, Index side, const T* x, T* __restrict out) {
  const Turn turn = quarter_turns(turns, side);
  if constexpr (sizeof(T) == 1) {
    const bool quarter = turn.down == 1 || turn.down == -1;
    if (quarter && side >= kBlock) return turn_bytes(turn, side, x, out);
  }
  for (Index row = 0; row < side; ++row, out += side) {
    const T* from = x + turn.origin + row * turn.down;
    for (Index column = 0; column < side; ++column) out[column] = from[column * turn.right];
  }
}

void convert_plane(const ImageStore& store, Index channel, const std::uint8_t* x, float* out) {
  kernels<float>().scale_bytes(store.plane, x, static_cast<float>(store.factors[channel]),
                               static_cast<float>(store.shifts[channel]), out);
}

template <typename T>
void convert_plane(const ImageStore& store, Index channel, const T* x, T* out) {
  if constexpr (sizeof(T) >= 4) {
    if (store.factors != nullptr) {
      kernels<T>().scale(store.plane, x, static_cast<T>(store.factors[channel]),
                         static_cast<T>(store.shifts[channel]), out);
      return;
    }
  }
  std::memcpy(out, x, static_cast<std::size_t>(store.plane) * sizeof(T));
}

// The images of one task after the other, with memory of its own for what is in between.
template <typename In, typename Out>
class TaskWriter {
 public:
  TaskWriter(const EpisodeSpec& spec, const EpisodeSizes& sizes, Out* support_x, Out* query_x)
      : spec_(spec),
        sizes_(sizes),
        support_x_(support_x),
        query_x_(query_x),
        side_(side_of(spec.store.plane)),
        turned_(static_cast<std::size_t>(spec.store.plane)),
        sorted_(static_cast<std::size_t>(std::max(sizes.ways, sizes.examples))),
        classes_(static_cast<std::size_t>(sizes.ways)),
        turns_(static_cast<std::size_t>(sizes.ways)),
        images_(static_cast<std::size_t>(sizes.ways * sizes.examples)) {}

  void write(const TaskWords& words, Index task) {
    draw_task(sizes_, words, sorted_.data(), classes_.data(), turns_.data(), images_.data());
    for (const Index image : images_) {
      prefetch(reinterpret_cast<const char*>(pixels(image)), size() * sizeof(In));
    }
    const Index first_way = task * sizes_.ways;
    for (Index way = 0; way < sizes_.ways; ++way) {
      for (Index k = 0; k < sizes_.examples; ++k) {
        const Index image = images_[static_cast<std::size_t>(way * sizes_.examples + k)];
        Out* out = k < spec_.shots
                       ? support_x_ + ((first_way + way) * spec_.shots + k) * size()
                       : query_x_ + ((first_way + way) * spec_.queries + k - spec_.shots) * size();
        write_image(pixels(image), turns_[static_cast<std::size_t>(way)], out);
      }
    }
  }

 private:
  Index size() const { return spec_.store.channels * spec_.store.plane; }
  const In* pixels(Index image) const {
    return static_cast<const In*>(spec_.store.images) + image * size();
  }

  void write_image(const In* x, Index turns, Out* out) {
    const Index plane = spec_.store.plane;
    for (Index channel = 0; channel < spec_.store.channels; ++channel, x += plane, out += plane) {
      if (turns != 0) turn_plane(turns, side_, x, turned_.data());
      convert_plane(spec_.store, channel, turns != 0 ? turned_.data() : x, out);
    }
  }

  const EpisodeSpec& spec_;
  const EpisodeSizes& sizes_;
  Out *support_x_, *query_x_;
  const Index side_;
  std::vector<In> turned_;
  std::vector<Index> sorted_, classes_, turns_, images_;
};

}  // namespace

EpisodeDrawer::EpisodeDrawer(const EpisodeSpec& spec) : spec_(spec) {
  check(spec);
  counts_.assign(spec.counts, spec.counts + spec.classes);
  Index total = 0;
  for (const Index count : counts_) {
    starts_.push_back(total);
    total += count;
  }
  members_.assign(spec.members, spec.members + total);
  spec_.members = nullptr;
  spec_.counts = nullptr;
  if (spec.store.factors == nullptr) return;
  factors_.assign(spec.store.factors, spec.store.factors + spec.store.channels);
  shifts_.assign(spec.store.shifts, spec.store.shifts + spec.store.channels);
  spec_.store.factors = factors_.data();
  spec_.store.shifts = shifts_.data();
}

void EpisodeDrawer::draw(std::uint64_t seed, std::uint64_t batch, void* support_x, void* query_x,
                         int threads) const {
  const auto draw_pixels = [&](auto in, auto out) {
    using Out = decltype(out);
    draw_as<decltype(in), Out>(seed, batch, static_cast<Out*>(support_x),
                               static_cast<Out*>(query_x), threads);
  };
  switch (spec_.store.pixel) {
    case Pixel::kByte:
      return draw_pixels(std::uint8_t{}, float{});
    case Pixel::kFloat:
      return draw_pixels(float{}, float{});
    case Pixel::kDouble:
      return draw_pixels(double{}, double{});
    case Pixel::kTwoBytes:
      return draw_pixels(std::uint16_t{}, std::uint16_t{});
  }
}

template <typename In, typename Out>
void EpisodeDrawer::draw_as(std::uint64_t seed, std::uint64_t batch, Out* support_x, Out* query_x,
                            int threads) const {
  const EpisodeSizes sizes{members_.data(), starts_.data(), counts_.data(),
                           spec_.classes,   spec_.ways,     spec_.shots + spec_.queries,
                           spec_.rotations};
  const int used = team_count(spec_.tasks, threads);
  std::vector<TaskWriter<In, Out>> writers(used, {spec_, sizes, support_x, query_x});
  // one thread does not wait for the pool: it may be drawing beside a meta-step
  ThreadPool::instance().run_units(used, spec_.tasks, [&](int thread, Index task) {
    const auto place = static_cast<std::uint32_t>(spec_.first_task + task);
    writers[thread].write(TaskWords(seed, batch, place), task);
  });
}

}  // namespace fastmaml
