// What a LatentAttention node brings: its attributes and operands, checked.
//
// The op is that of mla_deploy/ops/attention.py, and shapes are named as there: B sequences, S new
// tokens, H heads, N = qk_nope_head_dim, R = qk_rope_head_dim, V = v_head_dim, M pages a sequence.
// Lengths and pages, which are values, are checked by mla::cpu::latent_attention.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/latent_attention.h"
#include "ort/host.h"

namespace mla::ort {

// The node's inputs, in order; the parts of the cache follow, and are its outputs after `output`.
enum Input : size_t {
    kQ,            // [B, S, H * (N + R)] float32; float16 on a GPU
    kKv,           // [B, S, kv_lora_rank + R] float32; float16 on a GPU
    kCos,          // [B, S, R / 2] float32
    kSin,          // [B, S, R / 2] float32
    kWUk,          // [H, N, kv_lora_rank] float32 or float16; float16 on a GPU
    kWUv,          // [H, kv_lora_rank, V] as w_uk
    kBlockTable,   // [B, M] int64
    kPastLengths,  // [B] int64
    kNewLengths,   // [B] int64
    kCache,        // [pages, *page_shape], one a part
};

struct Attributes {
    cpu::CacheFormat cache_format;
    cpu::AttentionMode mode;
    cpu::AttentionDims dims;
    float softmax_scale;
    float latent_norm_epsilon;
};

// One array of the cache, as ONNX Runtime sees it.
struct Part {
    const char* name;
    ONNXTensorElementDataType type;
    int element_bytes;
    std::vector<int64_t> page_shape;
};

struct Operands {
    Tensor inputs[kCache];
    Tensor cache[cpu::kMaxParts];
    int64_t batch;               // B
    int64_t steps;               // S
    int64_t pages_per_sequence;  // M
    int64_t pages;               // of the arena
};

// Throws Error if an attribute is missing or unknown to the kernels.
Attributes read_attributes(const OrtApi& api, const OrtKernelInfo* info);

// The record of `attributes.cache_format`. Throws Error if it cannot hold such a latent.
std::vector<Part> cache_parts(const Attributes& attributes);

// What q, kv and the weights are in: on the CPU float32, and weights in float16 too.
enum class Activations { kFp32, kFp16 };

// Throws Error if the node's inputs are not as many, or of other types.
void check_types(const OrtApi& api, const OrtKernelInfo* info, const std::vector<Part>& parts,
                 Activations activations);

// Throws Error if a shape is not what it should be.
Operands read_operands(const OrtApi& api, const OrtKernelContext* context,
                       const Attributes& attributes, const std::vector<Part>& parts);

}  // namespace mla::ort
