// The expanded mode as a plan and its launches, for latent_attention.cu.
#pragma once

#include "cuda/launch.h"
#include "cuda/params.h"
#include "mla_deploy/cuda.h"

namespace mla::cuda {

// Whether there is a kernel of these head sizes.
bool can_expand(const mla_cuda_attention& a);

// Whether fewer operations are needed so. From sizes alone.
bool should_expand(const mla_cuda_attention& a, const Device& device);

struct ExpandedPlan {
    int64_t chunk_tokens;  // of each sequence
    int64_t chunks;
    int64_t round_steps;  // tokens of a sequence in a round of queries
    // Bytes of each part of the workspace, in this order; multiples of 256, as chunks are of
    // kExpandTokens.
    size_t c_kv, k_pe, keys, values, running;

    size_t bytes() const { return c_kv + k_pe + keys + values + running; }
};
ExpandedPlan plan_expanded(const mla_cuda_attention& a, const Device& device);

// What a plan takes at most, of these sizes and of fewer sequences, tokens and pages, on any
// device.
size_t most_expanded_bytes(const mla_cuda_attention& a);

// Attention over a cache that holds the new tokens already.
mla_cuda_status attend_expanded(const mla_cuda_attention& a, const ExpandedPlan& plan, Params p,
                                Stream stream);

}  // namespace mla::cuda
