#pragma once

#include "cuda/team.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

void update(const UpdateStep& step, const Stream& stream);
void update_adjoint(const UpdateAdjoint& adjoint, const Stream& stream);

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
