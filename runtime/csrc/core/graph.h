// The decoder graph in ONNX Runtime, with the cache bound to it in place.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/bundle.h"
#include "core/cancellation.h"
#include "core/host.h"
#include "core/memory.h"

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

    // Calls use(name, values, shape) with each.
    template <class Use>
    void for_each(const Use& use) {
        using Shape = std::vector<int64_t>;
        use("input_ids", input_ids, Shape{batch, steps});
        use("past_lengths", past_lengths, Shape{batch});
        use("new_lengths", new_lengths, Shape{batch});
        use("block_table", block_table, Shape{batch, pages});
        use("logit_index", logit_index, Shape{batch, logits});
    }
};

// On a device, steps of one token a sequence are recorded (as CUDA graphs), one recording for each
// shape [B, M]: their tensors stay at one address each, and their launches are repeated as one.
class DecoderGraph {
  public:
    struct Options {
        std::string onnxruntime_library;
        std::string ops_library;  // empty: onnxruntime's own kernels
        uint32_t threads = 0;     // 0: onnxruntime's choice, one a physical core
        bool spin = true;
    };

    // Errors: MLA_BAD_RUNTIME, MLA_BAD_BUNDLE, MLA_BAD_GRAPH, MLA_BAD_KERNELS.
    DecoderGraph(const Bundle& bundle, const Options& options);

    // Lets the graph read and write the arena, which must outlive the last run.
    void bind_cache(PageArena& arena);

    // The M that a step of so many pages is to have, so that there are few shapes to record.
    int64_t pages_for(int64_t steps, int64_t logits, int64_t pages) const;

    // One step; gives logits [B, L, vocab_size], which live until the next one. On a device, the
    // inputs are copied there and the logits from there, and nothing else; it has finished then.
    // Errors: MLA_MODEL_FAILED, MLA_CANCELLED, MLA_OUT_OF_MEMORY.
    const float* run(StepInputs& inputs, Cancellation* cancellation);

    const std::string& onnxruntime_version() const { return host_.version; }

  private:
    // Inputs, then logits, in one piece of the device's memory; and what onnxruntime calls it.
    struct Recording {
        CacheMemory& memory;
        uint8_t* data;
        size_t input_bytes, bytes;
        std::string id;
        OrtOwned<OrtIoBinding> binding;

        ~Recording() { memory.release(data, bytes); }
    };

    OrtOwned<OrtSession> open_session(const Bundle& bundle, const Options& options) const;
    OrtOwned<OrtValue> tensor(const OrtMemoryInfo& memory, void* data, size_t bytes,
                              const std::vector<int64_t>& shape,
                              ONNXTensorElementDataType type) const;
    OrtOwned<OrtIoBinding> new_binding() const;
    void bind_arena(OrtIoBinding& binding) const;
    void bind_input(OrtIoBinding& binding, const OrtMemoryInfo& memory, const char* name,
                    void* data, const std::vector<int64_t>& shape) const;
    void bind_logits(OrtIoBinding& binding, const OrtMemoryInfo& memory, void* data,
                     const StepInputs& inputs) const;
    bool is_recorded(int64_t steps, int64_t logits) const;
    const Recording* recording_for(StepInputs& inputs);
    std::unique_ptr<Recording> record(StepInputs& inputs) const;
    void run(const OrtIoBinding& binding, const std::string& recording,
             Cancellation* cancellation) const;
    void check(OrtStatus* status) const;

    const OrtHost& host_;
    const OrtApi& api_;
    OrtOwned<OrtMemoryInfo> host_memory_;
    OrtOwned<OrtMemoryInfo> cache_memory_;  // of the arena
    OrtOwned<OrtSession> session_;
    OrtOwned<OrtIoBinding> binding_;
    const int64_t vocab_size_;
    const bool records_;
    const PageArena* arena_ = nullptr;
    std::map<std::pair<int64_t, int64_t>, std::unique_ptr<Recording>> recordings_;  // by (B, M)
    std::vector<float> logits_;
};

}  // namespace mla::core
