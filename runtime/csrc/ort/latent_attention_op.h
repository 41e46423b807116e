// `ai.mla_deploy::LatentAttention`, as ONNX Runtime wants an operator described.
#pragma once

#include <onnxruntime_c_api.h>

namespace mla::ort {

// One description serves every session and every host; it lives as long as the library.
const OrtCustomOp* latent_attention_op();

// The same for CUDAExecutionProvider; null where the library was built without MLA_CUDA.
const OrtCustomOp* latent_attention_cuda_op();

}  // namespace mla::ort
