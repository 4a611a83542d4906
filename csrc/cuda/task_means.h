// The means over tasks of a meta-step's losses and gradients: by one block or by many, with the
// same bits.
#pragma once

#include "cuda/column_sums.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

template <typename T>
struct TaskMeans {
  static constexpr int kThreads = kColumns * kGroups;
  static constexpr std::size_t kSharedBytes = kThreads * sizeof(double);

  Index tasks;
  const T* losses;  // [tasks]
  T* mean_loss;     // null: not wanted
  const T* rows;    // [tasks, row]: gradients of theta, then of the rates
  Index row, theta_size;
  T *gtheta, *grates;

  // A block's part: a launch has column_blocks(row) of them.
  FASTMAML_TEAM void operator()(const Team& team, unsigned char* shared) const {
    if (team.block() == 0) of_losses(team, shared);
    team.sync();
    sum_columns<T>(
        team, tasks, row, reinterpret_cast<T*>(shared),
        [&](Index task, Index i) { return rows[task * row + i]; },
        [&](Index i, T sum) { of_gradients(i) = sum / T(tasks); });
  }

  // All of it.
  FASTMAML_TEAM void by_one_block(const Team& team, unsigned char* shared) const {
    of_losses(team, shared);
    for (Index i = team.rank(); i < row; i += team.size()) {
      of_gradients(i) =
          sum_column<T>(tasks, [&](Index task) { return rows[task * row + i]; }) / T(tasks);
    }
  }

 private:
  FASTMAML_TEAM T& of_gradients(Index i) const {
    return i < theta_size ? gtheta[i] : grates[i - theta_size];
  }

  // Does not end with a sync.
  FASTMAML_TEAM void of_losses(const Team& team, unsigned char* shared) const {
    if (mean_loss == nullptr) return;
    double* partial = reinterpret_cast<double*>(shared);
    for (Index item = team.rank(); item < kThreads; item += team.size()) {
      double sum = 0;
      for (Index task = item; task < tasks; task += kThreads) sum += losses[task];
      partial[item] = sum;
    }
    team.sync();
    if (team.rank() != 0) return;
    double sum = 0;
    for (Index item = 0; item < kThreads && item < tasks; ++item) sum += partial[item];
    *mean_loss = static_cast<T>(sum / static_cast<double>(tasks));
  }
};

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
