// The decoder graph in ONNX Runtime, with the cache bound to it in place.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/bundle.h"
#include "core/cancellation.h"
#include "core/host.h"

namespace mla::core {

class PageArena;

// The inputs of one step but for the cache, row after row. Shapes: mla_deploy/bundle.py.
struct StepInputs {
    int64_t batch = 0;                  // B
    int64_t steps = 0;                  // S
    int64_t pages = 0;                  // M
    int64_t logits = 0;                 // L
    std::vector<int64_t> input_ids;     // [B, S]
    std::vector<int64_t> past_lengths;  // [B]
    std::vector<int64_t> new_lengths;   // [B]
    std::vector<int64_t> block_table;   // [B, M]
    std::vector<int64_t> logit_index;   // [B, L]
};

class DecoderGraph {
  public:
    struct Options {
        std::string onnxruntime_library;
        std::string ops_library;  // empty: onnxruntime's own kernels
        uint32_t threads = 0;     // 0: onnxruntime's choice, one a physical core
        bool spin = true;
    };

    // Errors: MLA_BAD_RUNTIME, MLA_BAD_BUNDLE.
    DecoderGraph(const Bundle& bundle, const Options& options);

    // Lets the graph read and write the arena, which must outlive the last run.
    void bind_cache(PageArena& arena);

    // One step; gives logits [B, L, vocab_size], which live until the next one. On a device, the
    // inputs are copied there and the logits from there, and nothing else; it has finished then.
    // Errors: MLA_MODEL_FAILED, MLA_CANCELLED.
    const float* run(StepInputs& inputs, Cancellation* cancellation);

    const std::string& onnxruntime_version() const { return host_.version; }

  private:
    OrtOwned<OrtSession> open_session(const Bundle& bundle, const Options& options) const;
    OrtOwned<OrtValue> tensor(const OrtMemoryInfo& memory, void* data, size_t bytes,
                              const std::vector<int64_t>& shape,
                              ONNXTensorElementDataType type) const;
    void bind_input(const char* name, std::vector<int64_t>& values,
                    const std::vector<int64_t>& shape);
    void check(OrtStatus* status) const;

    const OrtHost& host_;
    const OrtApi& api_;
    OrtOwned<OrtMemoryInfo> host_memory_;
    OrtOwned<OrtMemoryInfo> cache_memory_;  // of the arena
    OrtOwned<OrtSession> session_;
    OrtOwned<OrtIoBinding> binding_;
    int64_t vocab_size_;
    std::vector<float> logits_;
};

}  // namespace mla::core
