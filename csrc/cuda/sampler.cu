// Batches of episodes in one kernel: a block for each class of each task. Every block draws its
// task's classes again, a few hundred instructions of one thread: a second kernel to draw them once
// would cost a launch, and the drawn positions a trip through memory.
#include <algorithm>
#include <cmath>

#include "cuda/sampler.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

namespace {

FASTMAML_TEAM inline float value_of(std::uint8_t x) { return static_cast<float>(x); }
template <typename T>
FASTMAML_TEAM T value_of(T x) {
  return x;
}

template <typename In, typename Out>
struct DrawEpisodes {
  static constexpr int kThreads = 256;

  EpisodeBatch args;
  Index side;  // of an image, where it is square

  FASTMAML_TEAM void operator()(const Team& team, unsigned char* shared) const {
    const Index examples = args.shots + args.queries;
    Index* turns = reinterpret_cast<Index*>(shared);
    Index* images = turns + 1;
    const Index task = team.block() / args.ways, way = team.block() % args.ways;
    if (team.rank() == 0) *turns = draw(task, way, images, images + examples);
    team.sync();
    write(team, images, *turns);
    if (args.place != nullptr) move_on(team);
  }

 private:
  FASTMAML_TEAM Index draw(Index task, Index way, Index* images, Index* sorted) const {
    const EpisodeSizes sizes{args.members,  args.starts, args.counts,
                             args.classes,  args.ways,   args.shots + args.queries,
                             args.rotations};
    const std::uint64_t seed = args.place != nullptr ? args.place[0] : args.seed;
    const std::uint64_t batch = args.place != nullptr ? args.place[1] : args.batch;
    const TaskWords words(seed, batch, static_cast<std::uint32_t>(args.first_task + task));
    return draw_way(sizes, words, way, sorted, images);
  }

  FASTMAML_TEAM void write(const Team& team, const Index* images, Index turns) const {
    const int plane = static_cast<int>(args.plane);
    const int size = plane * static_cast<int>(args.channels);
    const int support = size * static_cast<int>(args.shots);
    const int total = support + size * static_cast<int>(args.queries);
    const Turn turn = quarter_turns(turns, side);
    const In* pixels = static_cast<const In*>(args.images);
    Out* support_x = static_cast<Out*>(args.support_x) + team.block() * support;
    Out* query_x = static_cast<Out*>(args.query_x) + team.block() * (total - support);
    for (int i = team.rank(); i < total; i += team.size()) {
      const int within = i % size, channel = within / plane, pixel = within % plane;
      const Index from = turns == 0 ? pixel : turned(turn, pixel);
      const In x = pixels[images[i / size] * size + channel * plane + from];
      (i < support ? support_x[i] : query_x[i - support]) = converted(x, channel);
    }
  }

  FASTMAML_TEAM Index turned(const Turn& turn, int pixel) const {
    const int width = static_cast<int>(side);
    return turn.origin + pixel / width * turn.down + pixel % width * turn.right;
  }

  FASTMAML_TEAM Out converted(In x, int channel) const {
    if constexpr (sizeof(Out) >= 4) {
      if (args.factors != nullptr) {
        return scale_and_shift(value_of(x), static_cast<const Out*>(args.factors)[channel],
                               static_cast<const Out*>(args.shifts)[channel]);
      }
    }
    return value_of(x);
  }

  // The last block does it, when no other will read the place any more.
  FASTMAML_TEAM void move_on(const Team& team) const {
    const bool last = team.is_last_block(reinterpret_cast<unsigned long long*>(args.place + 2));
    if (last && team.rank() == 0) ++args.place[1];
  }
};

void expect(bool condition, const char* message) { require(condition, "draw_episodes", message); }

template <typename In, typename Out>
void draw_as(const EpisodeBatch& args, const Stream& stream) {
  const Index side = std::lround(std::sqrt(static_cast<double>(args.plane)));
  expect(args.rotations == Rotations::kNone || side * side == args.plane,
         "images must be square where classes are rotated");
  const Index examples = args.shots + args.queries;
  const Index bytes = (1 + examples + std::max(args.ways, examples)) * Index{sizeof(Index)};
  expect(bytes <= shared_memory_limit(stream.device),
         "ways, or shots + queries, are more than a block of the GPU can draw");
  launch("draw_episodes", DrawEpisodes<In, Out>{args, side}, args.tasks * args.ways,
         static_cast<std::size_t>(bytes), stream);
}

}  // namespace

void draw_episodes(const EpisodeBatch& args, const Stream& stream) {
  constexpr Index kMost = (Index{1} << 31) - 1;
  expect(args.images != nullptr, "images must not be null");
  expect(args.members != nullptr && args.starts != nullptr && args.counts != nullptr,
         "members, starts and counts must not be null");
  expect(args.support_x != nullptr || args.shots == 0, "support_x must not be null");
  expect(args.query_x != nullptr || args.queries == 0, "query_x must not be null");
  expect(args.ways > 0 && args.tasks > 0 && args.shots >= 0 && args.queries >= 0,
         "ways and tasks must be at least 1, shots and queries not negative");
  expect(args.tasks * args.ways <= kMost, "tasks * ways must be less than 2**31");
  expect(args.channels * args.plane * (args.shots + args.queries) <= kMost - 256,
         "the images of a class in a task must have fewer than 2**31 - 256 elements");
  expect(args.pixel != Pixel::kByte || args.factors != nullptr, "bytes must have factors");
  expect((args.factors == nullptr) == (args.shifts == nullptr),
         "factors and shifts must come together");
  switch (args.pixel) {
    case Pixel::kByte:
      return draw_as<std::uint8_t, float>(args, stream);
    case Pixel::kFloat:
      return draw_as<float, float>(args, stream);
    case Pixel::kDouble:
      return draw_as<double, double>(args, stream);
    case Pixel::kTwoBytes:
      return draw_as<std::uint16_t, std::uint16_t>(args, stream);
  }
}

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
