// A LatentAttention node on a GPU: operands in, mla_cuda_latent_attention enqueued on ONNX
// Runtime's stream. Built where MLA_CUDA is on.
#pragma once

#include <vector>

#include "ort/latent_attention_inputs.h"

namespace mla::ort {

// One node of one session.
class LatentAttentionCudaKernel {
  public:
    // Throws Error if the node is none that the kernels can compute, or the device cannot run them.
    LatentAttentionCudaKernel(const OrtApi& api, const OrtKernelInfo* info);

    // Enqueues; does not wait. Throws Error if the operands do not fit together.
    void compute(OrtKernelContext* context) const;

    const OrtApi& api;  // of the host that made it

  private:
    Attributes attributes_;
    std::vector<Part> parts_;
};

}  // namespace mla::ort
