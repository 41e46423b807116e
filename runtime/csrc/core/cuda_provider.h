// ONNX Runtime's provider of kernels for NVIDIA GPUs, asked for through its C API alone.
#pragma once

#include "core/host.h"

namespace mla::core {

// The graph is to run on the first CUDA device that the process sees.
// Errors: MLA_BAD_RUNTIME: this onnxruntime has no such provider, or it lacks CUDA's libraries.
void append_cuda_provider(const OrtHost& host, OrtSessionOptions& options);

}  // namespace mla::core
