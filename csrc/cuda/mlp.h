#pragma once

#include "cuda/team.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

Index mlp_shared_bytes(const MlpMetaStep& step);
Index mlp_scratch_bytes(const MlpMetaStep& step);
void mlp_meta_step(const MlpMetaStep& step, const Stream& stream);

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
