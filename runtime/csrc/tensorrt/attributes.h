// The attributes of a LatentAttention node as TensorRT passes them: a list of named fields. The
// names are those of ONNX, and what an engine stores is the same list.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "mla_deploy/cuda.h"

namespace mla::tensorrt {

struct Attributes {
    std::string cache_format;  // int4, int8 or fp16
    std::string mode;          // auto, absorbed or expanded
    int32_t num_heads = 0;
    int32_t qk_nope_head_dim = 0;
    int32_t qk_rope_head_dim = 0;
    int32_t v_head_dim = 0;
    int32_t kv_lora_rank = 0;
    float softmax_scale = 0;
    float latent_norm_epsilon = 0;

    // A call of these attributes; sizes of tensors, and pointers, are left to the caller.
    mla_cuda_attention call() const;
};

// The fields' names and types, as a creator tells them. They live as long as the library.
const std::vector<nvinfer1::PluginField>& field_names();

// The fields with values that point into `attributes`.
std::vector<nvinfer1::PluginField> to_fields(const Attributes& attributes);

// Throws std::invalid_argument where a field is missing, of another type, or no kernel can compute
// what it says.
Attributes from_fields(const nvinfer1::PluginFieldCollection& fields);

}  // namespace mla::tensorrt
