#include "cpu/thread_limit.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "cpu/thread_pool.h"

namespace fastmaml {

namespace {

ThreadLimit& limit_of_process() {
  static ThreadLimit limit;
  return limit;
}

bool fixed() {
  static const char* value = std::getenv("FASTMAML_FIXED_THREADS");
  return value != nullptr && std::strcmp(value, "1") == 0;
}

}  // namespace

void ThreadLimit::took(int wanted, int used, double seconds, double alone) {
  const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
  if (!lock) return;  // one of two calls at the same time says enough
  if (used > 1) {
    const double won = alone / (used / 2) - seconds;
    left_ = std::min(left_ + won, std::max(kCredit, kCreditOfCalls * seconds));
    if (left_ < 0) return halve(used);
  }
  if (used > limit_) {
    if (left_ < kCredit) return;
    limit_ = used;
    patience_ = kLeastPatience;
    try_more();
  } else if (wanted > limit_) {
    calm_ -= seconds;
    if (calm_ <= 0) try_more();
  }
}

void ThreadLimit::halve(int used) {
  const bool tried = used > limit_;
  patience_ = tried ? std::min(2 * patience_, kMostPatience) : kLeastPatience;
  limit_ = std::max(1, used / 2);
  calm_ = patience_ * (credit_ - left_);
  credit_ = left_ = kCredit;
  allowed_.store(limit_);
}

void ThreadLimit::try_more() {
  credit_ = left_ = kCreditOfTry;
  allowed_.store(limit_ > kNone / 2 ? kNone : 2 * limit_);
}

CallThreads::CallThreads(int wanted)
    : wanted_(wanted),
      used_(fixed() ? wanted : limit_of_process().allowed(wanted)),
      started_(seconds_now()),
      waited_(team_seconds().waited),
      spared_(team_seconds().spared) {}

CallThreads::~CallThreads() {
  const double seconds = seconds_now() - started_;
  const double worked = seconds - (team_seconds().waited - waited_);
  limit_of_process().took(wanted_, used_, seconds, worked + team_seconds().spared - spared_);
}

}  // namespace fastmaml
