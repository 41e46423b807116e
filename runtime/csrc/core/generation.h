// The loop that makes tokens: prefill, then sample, hand out and decode one after another.
#pragma once

#include <vector>

#include "core/cancellation.h"
#include "core/sampling.h"
#include "core/session.h"

namespace mla::core {

struct GenerationOptions {
    SamplingOptions sampling;
    std::vector<mla_token> stop_tokens;
    mla_token_callback callback = nullptr;
    void* user_data = nullptr;
    Cancellation* cancellation = nullptr;
    size_t max_tokens = 256;
    bool ignore_eos = false;
};

struct GenerationResult {
    std::vector<mla_token> tokens;
    mla_finish_reason finish_reason = MLA_FINISH_NONE;
    size_t reused_tokens = 0;
    double prefill_ms = 0;
    double decode_ms = 0;
    uint64_t cache_bytes = 0;
};

// Continues a prompt; `result` is filled as far as it comes, also when there is an error.
// Errors: see mla_generate.
void generate(Session& session, const mla_token* prompt, size_t prompt_count,
              const GenerationOptions& options, GenerationResult& result);

}  // namespace mla::core
