// The kernels compiled for the host; see team.h.
#include "cuda/sampler.cu"
#include "cuda/table.cu"
