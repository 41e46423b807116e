// A LatentAttention node at work: operands in, mla::cpu::latent_attention called, cache written.
#pragma once

#include <memory>
#include <vector>

#include "ort/latent_attention_inputs.h"

namespace mla::ort {

// One node of one session. ONNX Runtime may call `compute` from several threads at once.
class LatentAttentionKernel {
  public:
    // Throws Error if the node is none that the kernels can compute.
    LatentAttentionKernel(const OrtApi& api, const OrtKernelInfo* info);

    // Throws Error if the operands do not fit together; the cache is as it was then.
    void compute(OrtKernelContext* context) const;

    const OrtApi& api;  // of the host that made it

  private:
    using Weights = std::unique_ptr<cpu::PreparedWeights, decltype(&cpu::free_weights)>;

    Weights prepare(const Tensor& w_uk, const Tensor& w_uv) const;

    Attributes attributes_;
    std::vector<Part> parts_;
    cpu::Isa isa_;
    Weights weights_;  // null: they are computed in the graph, so every call prepares them
};

}  // namespace mla::ort
