// Teams are host threads, one block after the other; see team.h.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "fastmaml/device.h"

#define FASTMAML_TEAM_NAMESPACE emulated
#define FASTMAML_TEAM

namespace fastmaml {
namespace emulated {

class Barrier {
 public:
  explicit Barrier(int threads) : threads_(threads) {}

  void wait() {
    if (threads_ == 1) return;
    std::unique_lock<std::mutex> lock(mutex_);
    const unsigned round = round_;
    if (++waiting_ == threads_) {
      waiting_ = 0;
      ++round_;
      all_here_.notify_all();
    } else {
      all_here_.wait(lock, [&] { return round_ != round; });
    }
  }

 private:
  const int threads_;
  int waiting_ = 0;
  unsigned round_ = 0;
  std::mutex mutex_;
  std::condition_variable all_here_;
};

class Team {
 public:
  Team(int rank, int size, Index block, Index blocks, Barrier* barrier)
      : rank_(rank), size_(size), block_(block), blocks_(blocks), barrier_(barrier) {}

  int rank() const { return rank_; }
  int size() const { return size_; }
  Index block() const { return block_; }
  Index blocks() const { return blocks_; }
  void sync() const { barrier_->wait(); }

  bool is_last_block(unsigned long long* arrived) const {
    if (rank_ == 0 && ++*arrived == static_cast<unsigned long long>(blocks_)) *arrived = 0;
    sync();
    return *arrived == 0;
  }

 private:
  int rank_, size_;
  Index block_, blocks_;
  Barrier* barrier_;
};

template <typename Body>
void launch(const std::string&, const Body& body, Index blocks, std::size_t shared_bytes,
            const Stream& stream) {
  const int size = stream.emulated_threads;
  if (stream.emulated_launches != nullptr) ++*stream.emulated_launches;
  std::vector<std::max_align_t> shared(shared_bytes / sizeof(std::max_align_t) + 1);
  Barrier barrier(size);
  const auto member = [&](int rank) {
    for (Index block = 0; block < blocks; ++block) {
      body(Team(rank, size, block, blocks, &barrier),
           reinterpret_cast<unsigned char*>(shared.data()));
      barrier.wait();
    }
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < size; ++rank) others.emplace_back(member, rank);
  member(0);
  for (std::thread& thread : others) thread.join();
}

inline void require_usable(int) {}
inline Index shared_memory_limit(int) { return Index{227} << 10; }

}  // namespace emulated
}  // namespace fastmaml
