// The inner update of all parameters of all tasks in one launch, and its adjoint.
#include "cuda/column_sums.h"
#include "cuda/update.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

namespace {

template <typename T>
FASTMAML_TEAM T rate_of(const RateTerm& term, Index parameter) {
  const T rate = static_cast<T>(term.rate);
  if (term.rates == nullptr) return rate;
  return rate * static_cast<const T*>(term.rates)[term.per_parameter ? parameter : 0];
}

template <typename T>
struct Update {
  static constexpr int kThreads = 256;
  static constexpr int kEach = 4;  // elements of a thread, a block apart
  static constexpr Index kTile = Index{kThreads} * kEach;

  UpdateStep args;
  Index tiles;  // of a task

  FASTMAML_TEAM void operator()(const Team& team, unsigned char*) const {
    const Index task = team.block() / tiles, first = team.block() % tiles * kTile;
    const T* theta = static_cast<const T*>(args.theta) + task * args.theta_stride;
    const T* gradient = static_cast<const T*>(args.gradient) + task * args.size;
    T* moved = static_cast<T*>(args.moved) + task * args.size;
    const Index end = first + kTile < args.size ? first + kTile : args.size;
    for (Index i = first + team.rank(); i < end; i += team.size()) {
      moved[i] = theta[i] - rate_of<T>(args.rate, i) * gradient[i];
    }
  }
};

template <typename T>
struct Adjoint {
  static constexpr int kThreads = kColumns * kGroups;

  UpdateAdjoint args;

  FASTMAML_TEAM void operator()(const Team& team, unsigned char* shared) const {
    const T* cotangent = static_cast<const T*>(args.cotangent);
    const T* gradient = static_cast<const T*>(args.gradient);
    T* dgradient = static_cast<T*>(args.dgradient);
    T* drates = static_cast<T*>(args.drates);
    const T scale = -static_cast<T>(args.rate.rate);
    sum_columns<T>(
        team, args.tasks, args.size, reinterpret_cast<T*>(shared),
        [&](Index task, Index i) {
          const Index at = task * args.size + i;
          const T u = cotangent[at];
          if (dgradient != nullptr) dgradient[at] = -rate_of<T>(args.rate, i) * u;
          return drates != nullptr ? u * gradient[at] : T(0);
        },
        [&](Index i, T sum) {
          if (drates != nullptr) drates[i] = scale * sum;
        });
  }
};

template <typename T>
void update_as(const UpdateStep& step, const Stream& stream) {
  const Index tiles = (step.size + Update<T>::kTile - 1) / Update<T>::kTile;
  require(tiles * step.tasks < Index{1} << 31, "update", "tasks * size is too large");
  launch("update", Update<T>{step, tiles}, tiles * step.tasks, 0, stream);
}

template <typename T>
void adjoint_as(const UpdateAdjoint& adjoint, const Stream& stream) {
  const Index blocks = column_blocks(adjoint.size);
  require(blocks < Index{1} << 31, "update_adjoint", "size is too large");
  launch("update_adjoint", Adjoint<T>{adjoint}, blocks, sizeof(T) * Adjoint<T>::kThreads, stream);
}

}  // namespace

void update(const UpdateStep& step, const Stream& stream) {
  require(step.theta != nullptr && step.gradient != nullptr && step.moved != nullptr, "update",
          "theta, gradient and moved must not be null");
  require(step.tasks > 0 && step.size > 0, "update", "tasks and size must be at least 1");
  require(step.theta_stride == 0 || step.theta_stride >= step.size, "update",
          "theta_stride must be 0 or at least size");
  if (step.dtype == DType::kFloat32) return update_as<float>(step, stream);
  update_as<double>(step, stream);
}

void update_adjoint(const UpdateAdjoint& adjoint, const Stream& stream) {
  require(adjoint.cotangent != nullptr, "update_adjoint", "cotangent must not be null");
  require(adjoint.drates == nullptr || adjoint.gradient != nullptr, "update_adjoint",
          "gradient must not be null where drates is wanted");
  require(adjoint.tasks > 0 && adjoint.size > 0, "update_adjoint",
          "tasks and size must be at least 1");
  if (adjoint.dtype == DType::kFloat32) return adjoint_as<float>(adjoint, stream);
  adjoint_as<double>(adjoint, stream);
}

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
