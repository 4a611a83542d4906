#pragma once

#include "cuda/team.h"

namespace fastmaml {
namespace FASTMAML_TEAM_NAMESPACE {

void draw_episodes(const EpisodeBatch& batch, const Stream& stream);

}  // namespace FASTMAML_TEAM_NAMESPACE
}  // namespace fastmaml
