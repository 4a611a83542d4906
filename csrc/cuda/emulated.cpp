// The kernels compiled for the host; see team.h.
#include "cuda/mlp.cu"
#include "cuda/sampler.cu"
#include "cuda/table.cu"
#include "cuda/update.cu"
