#include "cpu/program_memory.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace fastmaml {

namespace {

constexpr std::align_val_t kAlignment{64};
constexpr std::size_t kAlwaysKeptBytes = std::size_t{512} << 20;

}  // namespace

ArenaPool::~ArenaPool() {
  for (const Block& block : free_) ::operator delete(block.memory, kAlignment);
}

void* ArenaPool::take_bytes(std::size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    used_bytes_ += bytes;
    most_used_bytes_ = std::max(most_used_bytes_, used_bytes_);
    for (auto block = free_.rbegin(); block != free_.rend(); ++block) {
      if (block->bytes != bytes) continue;
      void* memory = block->memory;
      free_.erase(std::next(block).base());
      free_bytes_ -= bytes;
      return memory;
    }
  }
  void* memory = ::operator new(bytes, kAlignment);
  std::memset(memory, 0, bytes);
  return memory;
}

void ArenaPool::give(void* memory, std::size_t bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back({memory, bytes});
  free_bytes_ += bytes;
  used_bytes_ -= bytes;
  // Blocks serve their own size only, and not all sizes are most in use at the same time.
  const std::size_t kept = std::max(kAlwaysKeptBytes, most_used_bytes_ + most_used_bytes_ / 4);
  while (!free_.empty() && free_bytes_ + used_bytes_ > kept) {
    ::operator delete(free_.front().memory, kAlignment);
    free_bytes_ -= free_.front().bytes;
    free_.pop_front();
  }
}

}  // namespace fastmaml
