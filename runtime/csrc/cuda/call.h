// A call as the C interface has it, checked, and as the kernels want it.
#pragma once

#include "cuda/params.h"
#include "cuda/status.h"

namespace mla::cuda {

constexpr int64_t kMaxSplits = 256;

// Sizes, formats and modes: all that may be asked of a call without memory.
mla_cuda_status check_sizes(const mla_cuda_attention& a);

// What append needs, of a call whose sizes are checked.
mla_cuda_status fill_append(const mla_cuda_attention& a, Params* p);

// The same for attention, but for the workspace's parts.
mla_cuda_status fill_attention(const mla_cuda_attention& a, Params* p);

mla_cuda_status check_workspace(const mla_cuda_attention& a, size_t needed);

}  // namespace mla::cuda
