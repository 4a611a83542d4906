// Which rows a convolution multiplies with which weights, worked out once per geometry. Knows no
// instruction set: the objects that do only read these plain arrays.
#pragma once

#include "kernels.h"
#include "row_pair.h"

namespace fastmaml {

// Destination rows that draw on the same kernel taps. Padding is never multiplied: a row at the
// border belongs to another pass than one inside.
struct ConvPass {
  const std::int32_t* taps;    // which weight matrices
  const std::int32_t* shifts;  // source row of each tap, counted from the row's first source
  int tap_count;
  const std::int32_t* source;  // first source row of each destination row
  const std::int32_t* destination;
  Index rows;
  bool accumulate;  // an earlier pass has written these rows
};

// One direction: forward (sources are inputs) or input gradient (sources are output gradients).
struct ConvSweep {
  const ConvPass* passes;
  int pass_count;
  Index images;                         // that the lists cover
  Index source_rows, destination_rows;  // per image
  Index block_rows;                     // destination rows whose data stay in the L2 cache
};

// The weight gradient walks units (images, or lines of an image) in blocks. A tap's pairs for any
// number of units are a prefix of its list.
struct ConvTapPairs {
  const RowPair* pairs;  // input and output rows
  Index per_unit;
  Index first_unit, last_unit;  // units outside meet only padding
  Index input_start;            // input row of unit 0, to which the list is relative
};
struct ConvWeightWalk {
  const ConvTapPairs* taps;
  Index scopes, units;  // scopes of units; only the units of one scope are walked together
  Index block_units;
  Index scope_input, scope_output, unit_input, unit_output;  // rows from one to the next
};

struct ConvPlan {
  ConvGeometry geometry;
  Index images;
  ConvSweep forward, input_grad;
  ConvWeightWalk weight_grad;
};

struct ConvBlocking {
  int lanes;
  int panel_vectors;  // vectors of channels that one register tile spans
  int tile_rows;      // rows of that tile
  int scalar_bytes;
};

ConvPlan* make_conv_plan(const ConvGeometry& geometry, Index images, const ConvBlocking& blocking);
void free_conv_plan(ConvPlan* plan);

}  // namespace fastmaml
