// Memory that is kept between calls, so that in a steady state nothing is allocated.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

namespace fastmaml {

class ArenaPool : public std::enable_shared_from_this<ArenaPool> {
 public:
  ArenaPool() = default;
  ArenaPool(const ArenaPool&) = delete;
  ArenaPool& operator=(const ArenaPool&) = delete;
  ~ArenaPool();

  // Memory for `count` elements, aligned to 64 bytes, with some finite contents; null for none. It
  // returns to the pool when the last reference goes.
  template <typename T>
  std::shared_ptr<T> take(Index count) {
    if (count == 0) return nullptr;
    const Block block = take_bytes(static_cast<std::size_t>(count) * sizeof(T));
    return std::shared_ptr<T>(static_cast<T*>(block.memory),
                              [pool = shared_from_this(), block](T*) { pool->give(block); });
  }

 private:
  struct Block {
    void* memory;
    std::size_t bytes;
    std::uint64_t given;  // when it was given back, in numbers of blocks
  };

  Block take_bytes(std::size_t bytes);
  void give(Block block);
  void use(std::size_t bytes);
  void drop_oldest();

  std::mutex mutex_;
  std::map<std::size_t, std::deque<Block>> free_;  // by size; of one size the oldest first
  std::uint64_t given_ = 0;
  std::size_t free_bytes_ = 0;
  // The pool holds not much more than was once in use at the same time (or some hundred megabytes).
  std::size_t used_bytes_ = 0;
  std::size_t most_used_bytes_ = 0;
};

// One row of sums per group.
template <typename T>
class GroupSums {
 public:
  GroupSums() = default;
  GroupSums(ArenaPool& memory, Index groups, Index width)
      : groups_(groups), width_(width), rows_(memory.take<T>(groups * width)) {}

  T* row(Index group) const { return rows_.get() + group * width_; }
  void clear() const { std::fill(row(0), row(groups_), T(0)); }
  // Adds all rows to the first; or these parts of them.
  T* total(const Kernels<T>& kernels, int threads) const {
    return total(kernels, threads, {{0, width_}});
  }
  T* total(const Kernels<T>& kernels, int threads, const std::vector<Range>& parts) const;

 private:
  Index groups_ = 0, width_ = 0;
  std::shared_ptr<T> rows_;
};

}  // namespace fastmaml
