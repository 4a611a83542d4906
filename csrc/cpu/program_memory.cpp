#include "cpu/program_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <new>

namespace fastmaml {

namespace {

constexpr std::align_val_t kAlignment{64};
constexpr std::size_t kAlwaysKeptBytes = std::size_t{512} << 20;
constexpr std::size_t kMappedBytes = std::size_t{1} << 20;
constexpr std::size_t kMostSlack = 2;  // of a block over what it is taken for

// Zeros. A large block is mapped: the system zeroes its pages where a thread first comes to them.
void* allocate(std::size_t bytes) {
  if (bytes < kMappedBytes) {
    void* memory = ::operator new(bytes, kAlignment);
    std::memset(memory, 0, bytes);
    return memory;
  }
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return memory;
}

void release(void* memory, std::size_t bytes) {
  if (bytes < kMappedBytes) {
    ::operator delete(memory, kAlignment);
  } else {
    munmap(memory, bytes);
  }
}

}  // namespace

ArenaPool::~ArenaPool() {
  for (const auto& [bytes, blocks] : free_) {
    for (const Block& block : blocks) release(block.memory, bytes);
  }
}

// The smallest block that is large enough, and of these the latest: it is likeliest to be in the
// cache. A call of another shape than those before it thus finds memory that it need not wait for.
ArenaPool::Block ArenaPool::take_bytes(std::size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = free_.lower_bound(bytes);
    if (found != free_.end() && found->first <= kMostSlack * bytes) {
      const Block block = found->second.back();
      found->second.pop_back();
      if (found->second.empty()) free_.erase(found);
      free_bytes_ -= block.bytes;
      use(block.bytes);
      return block;
    }
  }
  const Block block{allocate(bytes), bytes, 0};
  std::lock_guard<std::mutex> lock(mutex_);
  use(bytes);
  return block;
}

void ArenaPool::use(std::size_t bytes) {
  used_bytes_ += bytes;
  most_used_bytes_ = std::max(most_used_bytes_, used_bytes_);
}

void ArenaPool::give(Block block) {
  std::lock_guard<std::mutex> lock(mutex_);
  block.given = given_++;
  free_[block.bytes].push_back(block);
  free_bytes_ += block.bytes;
  used_bytes_ -= block.bytes;
  // Blocks serve sizes like their own, and not all sizes are most in use at the same time.
  const std::size_t kept = std::max(kAlwaysKeptBytes, most_used_bytes_ + most_used_bytes_ / 4);
  while (!free_.empty() && free_bytes_ + used_bytes_ > kept) drop_oldest();
}

void ArenaPool::drop_oldest() {
  const auto oldest = std::min_element(
      free_.begin(), free_.end(),
      [](const auto& a, const auto& b) { return a.second.front().given < b.second.front().given; });
  const Block block = oldest->second.front();
  release(block.memory, block.bytes);
  free_bytes_ -= block.bytes;
  oldest->second.pop_front();
  if (oldest->second.empty()) free_.erase(oldest);
}

}  // namespace fastmaml
