// Sums over tasks, in an order that depends on their number alone: nothing is added by atomics.
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

// The same sum of one column, to the last bit, by one thread: term(task).
template <typename T, typename Term>
FASTMAML_TEAM T sum_column(Index tasks, Term term) {
  constexpr int kAtOnce = 2 * kGroups;  // terms that are read before any is added
  T sums[kGroups] = {};
  for (Index first = 0; first < tasks; first += kAtOnce) {
    const Index left = tasks - first;  // past the end the first is read again: no branches
    T terms[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) terms[i] = term(first + (i < left ? i : 0));
    for (int i = 0; i < kAtOnce; ++i) sums[i % kGroups] += i < left ? terms[i] : T(0);
  }
  T sum = sums[0];
  for (int group = 1; group < kGroups; ++group) sum += sums[group];
  return sum;
}

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
