// Sums over tasks, in an order that depends on their number alone: no atomics.
#pragma once

#include "cuda/team.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

constexpr int kColumns = 32;  // of a block: what a warp reads at once
constexpr int kGroups = 8;    // of tasks, summed side by side

inline Index column_blocks(Index columns) { return (columns + kColumns - 1) / kColumns; }

// For the team's own kColumns columns: total(column, sum over tasks of term(task, column)).
// `partial` holds kColumns * kGroups values of the team's shared memory.
template <typename T, typename Term, typename Total>
FASTMAML_TEAM void sum_columns(const Team& team, Index tasks, Index columns, T* partial, Term term,
                               Total total) {
  const Index first = team.block() * kColumns;
  for (int item = team.rank(); item < kColumns * kGroups; item += team.size()) {
    const Index column = first + item % kColumns;
    T sum = 0;
    for (Index task = item / kColumns; column < columns && task < tasks; task += kGroups) {
      sum += term(task, column);
    }
    partial[item] = sum;
  }
  team.sync();
  for (int item = team.rank(); item < kColumns; item += team.size()) {
    if (first + item >= columns) continue;
    T sum = partial[item];
    for (int group = 1; group < kGroups; ++group) sum += partial[group * kColumns + item];
    total(first + item, sum);
  }
}

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
