// The loop that makes tokens: prefill, then sample and decode one after another.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "core/cancellation.h"
#include "core/engine.h"
#include "core/sampling.h"
#include "core/session.h"

namespace mla::core {

struct GenerationOptions {
    SamplingOptions sampling;
    std::vector<mla_token> stop_tokens;
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

// A generation that is asked for one token after another. One thread at a time.
//
// It owns nothing of the session between two tokens: whoever drives it claims the session for a
// token (as the Python iterator does) or for all of them (as `generate` does).
class Generation {
  public:
    // Errors: MLA_INVALID_ARGUMENT.
    Generation(std::shared_ptr<Session> session, std::vector<mla_token> prompt,
               const GenerationOptions& options);

    // Makes a token: the first call computes the prompt. False: it ended before. A generation that
    // was cancelled has ended; so has one that failed.
    // claim: on the session. Errors: see mla_generate, and MLA_BUSY if the session was changed
    // since the token before.
    bool next(const Claim& claim, Cancellation* cancellation);

    // For whoever has seen enough.
    void finish(mla_finish_reason reason);

    // What was made so far.
    const GenerationResult& result() const { return result_; }

    Session& session() const { return *session_; }
    size_t prompt_tokens() const { return prompt_.size(); }

  private:
    void prefill(const Claim& claim, Cancellation* cancellation);
    void decode(const Claim& claim, Cancellation* cancellation);
    void step(const mla_token* tokens, size_t count, bool logits_wanted, const Claim& claim,
              Cancellation* cancellation);
    mla_finish_reason reason_to_finish(mla_token token, uint64_t room) const;
    Engine::SessionInfo note_session();

    const std::shared_ptr<Session> session_;
    const std::vector<mla_token> prompt_;
    const GenerationOptions options_;
    GenerationResult result_;
    Sampler sampler_;
    std::vector<float> logits_;
    uint64_t session_changes_ = 0;
    bool ended_ = false;
};

// Continues a prompt to the end. on_token: may be empty; true: stop. `result` is filled as far as
// it comes, also when there is an error. Errors: see mla_generate.
void generate(std::shared_ptr<Session> session, std::vector<mla_token> prompt,
              const GenerationOptions& options, const std::function<bool(mla_token)>& on_token,
              Cancellation* cancellation, GenerationResult& result);

}  // namespace mla::core
