// Who is drawn into a task: plain functions for host and device, see philox.h.
#pragma once

#include <cstdint>

#include "fastmaml/philox.h"

namespace fastmaml {

enum class Rotations { kNone, kPerClass, kAsClasses };

constexpr std::int64_t kQuarterTurns = 4;

// What is drawn from, and how much.
struct EpisodeSizes {
  const std::int64_t* members;  // positions of images, class by class
  const std::int64_t* starts;   // [classes] into members
  const std::int64_t* counts;   // [classes]
  std::int64_t classes, ways, examples;
  Rotations rotations;

  FASTMAML_EVERYWHERE std::int64_t population() const {
    return rotations == Rotations::kAsClasses ? classes * kQuarterTurns : classes;
  }
};

// A class of a task, and its quarter turns.
struct DrawnClass {
  std::int64_t label, turns;
};

FASTMAML_EVERYWHERE inline DrawnClass drawn_class(const EpisodeSizes& sizes, std::int64_t drawn,
                                                  std::uint32_t turn_word) {
  if (sizes.rotations == Rotations::kAsClasses) {
    return {drawn / kQuarterTurns, drawn % kQuarterTurns};
  }
  const bool turned = sizes.rotations == Rotations::kPerClass;
  return {drawn, turned ? below(turn_word, kQuarterTurns) : 0};
}

// Positions of `examples` images of a class. `sorted` is scratch for as many.
FASTMAML_EVERYWHERE inline void draw_images(const EpisodeSizes& sizes, std::int64_t label,
                                            TaskWords* words, std::int64_t* sorted,
                                            std::int64_t* images) {
  const std::int64_t* members = sizes.members + sizes.starts[label];
  for (std::int64_t k = 0; k < sizes.examples; ++k) {
    images[k] = members[draw_another(words->next(), sizes.counts[label], sorted, k)];
  }
}

// The words are used in this order: the classes; a turn for each class (in any case, so that
// rotations do not change which images are in a batch); the examples, class by class. `sorted` is
// scratch for the larger of ways and examples.
FASTMAML_EVERYWHERE inline void draw_task(const EpisodeSizes& sizes, TaskWords words,
                                          std::int64_t* sorted, std::int64_t* classes,
                                          std::int64_t* turns, std::int64_t* images) {
  for (std::int64_t i = 0; i < sizes.ways; ++i) {
    classes[i] = draw_another(words.next(), sizes.population(), sorted, i);
  }
  for (std::int64_t i = 0; i < sizes.ways; ++i) {
    const DrawnClass drawn = drawn_class(sizes, classes[i], words.next());
    classes[i] = drawn.label;
    turns[i] = drawn.turns;
  }
  for (std::int64_t i = 0; i < sizes.ways; ++i, images += sizes.examples) {
    draw_images(sizes, classes[i], &words, sorted, images);
  }
}

// The same for the class in place `way` alone; returns its turns.
FASTMAML_EVERYWHERE inline std::int64_t draw_way(const EpisodeSizes& sizes, TaskWords words,
                                                 std::int64_t way, std::int64_t* sorted,
                                                 std::int64_t* images) {
  std::int64_t last = 0;
  for (std::int64_t i = 0; i <= way; ++i) {
    last = draw_another(words.next(), sizes.population(), sorted, i);
  }
  words.seek(sizes.ways + way);
  const DrawnClass drawn = drawn_class(sizes, last, words.next());
  words.seek(2 * sizes.ways + way * sizes.examples);
  draw_images(sizes, drawn.label, &words, sorted, images);
  return drawn.turns;
}

// Which pixel of an image of side x side another one shows after so many quarter turns
// counter-clockwise: pixel (row, column) shows pixel `origin + row * down + column * right`.
struct Turn {
  std::int64_t origin, down, right;
};

FASTMAML_EVERYWHERE inline Turn quarter_turns(std::int64_t turns, std::int64_t side) {
  switch (turns) {
    case 1:
      return {side - 1, -1, side};
    case 2:
      return {side * side - 1, -side, -1};
    case 3:
      return {(side - 1) * side, 1, -side};
    default:
      return {0, side, 1};
  }
}

}  // namespace fastmaml
