// ONNX Runtime's provider of kernels for NVIDIA GPUs, asked for through its C API alone.
#pragma once

#include "core/host.h"

namespace mla::core {

// The graph is to run on the first CUDA device that the process sees; where it `records`, the run
// option gpu_graph_id names the recording (a CUDA graph) that a run makes or repeats, -1 for none.
// Errors: MLA_BAD_RUNTIME: this onnxruntime has no such provider, or it lacks CUDA's libraries.
void append_cuda_provider(const OrtHost& host, OrtSessionOptions& options, bool records);

}  // namespace mla::core
