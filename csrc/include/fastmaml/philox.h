// Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011), and draws
// without replacement. Plain functions for host and device: a task's words depend on the seed, the
// batch and the task alone, so every backend draws the same episodes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTMAML_EVERYWHERE __host__ __device__
#else
#define FASTMAML_EVERYWHERE
#endif

namespace fastmaml {

FASTMAML_EVERYWHERE inline void philox4x32(const std::uint32_t (&counter)[4], std::uint64_t key,
                                           std::uint32_t (&words)[4]) {
  std::uint32_t key0 = static_cast<std::uint32_t>(key);
  std::uint32_t key1 = static_cast<std::uint32_t>(key >> 32);
  std::uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t left = std::uint64_t{0xD2511F53u} * c0;
    const std::uint64_t right = std::uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<std::uint32_t>(right >> 32) ^ c1 ^ key0;
    c1 = static_cast<std::uint32_t>(right);
    c2 = static_cast<std::uint32_t>(left >> 32) ^ c3 ^ key1;
    c3 = static_cast<std::uint32_t>(left);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// One task's words, in order: words 4i to 4i + 3 are those of the counter (i, task, batch), the
// key is the seed.
class TaskWords {
 public:
  FASTMAML_EVERYWHERE TaskWords(std::uint64_t seed, std::uint64_t batch, std::uint32_t task)
      : seed_(seed),
        counter_{0, task, static_cast<std::uint32_t>(batch),
                 static_cast<std::uint32_t>(batch >> 32)} {}

  FASTMAML_EVERYWHERE std::uint32_t next() {
    if (used_ == 4) {
      philox4x32(counter_, seed_, words_);
      ++counter_[0];
      used_ = 0;
    }
    return words_[used_++];
  }

  // The next word is the one in this place of the sequence.
  FASTMAML_EVERYWHERE void seek(std::int64_t place) {
    counter_[0] = static_cast<std::uint32_t>(place / 4);
    used_ = 4;
    for (std::int64_t i = place % 4; i > 0; --i) next();
  }

 private:
  std::uint64_t seed_;
  std::uint32_t counter_[4], words_[4] = {};
  int used_ = 4;
};

// A word as an integer from 0 to bound - 1.
FASTMAML_EVERYWHERE inline std::int64_t below(std::uint32_t word, std::int64_t bound) {
  return static_cast<std::int64_t>(
      (static_cast<std::uint64_t>(word) * static_cast<std::uint64_t>(bound)) >> 32);
}

// Draw number `count` without replacement: the word picks one of the integers below `population`
// that are not among the `count` ones in `sorted`, which it joins.
FASTMAML_EVERYWHERE inline std::int64_t draw_another(std::uint32_t word, std::int64_t population,
                                                     std::int64_t* sorted, std::int64_t count) {
  std::int64_t drawn = below(word, population - count);
  std::int64_t place = 0;
  for (; place < count && sorted[place] <= drawn; ++place) ++drawn;
  for (std::int64_t i = count; i > place; --i) sorted[i] = sorted[i - 1];
  sorted[place] = drawn;
  return drawn;
}

}  // namespace fastmaml
