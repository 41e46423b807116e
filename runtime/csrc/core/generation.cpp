#include "core/generation.h"

#include <algorithm>
#include <chrono>

#include "core/engine.h"
#include "core/error.h"

namespace mla::core {

namespace {

// Adds the time of its life to `total`.
class Stopwatch {
  public:
    explicit Stopwatch(double& total_ms) : total_ms_(total_ms) {}
    ~Stopwatch() {
        const std::chrono::duration<double, std::milli> passed = Clock::now() - start_;
        total_ms_ += passed.count();
    }
    Stopwatch(const Stopwatch&) = delete;
    Stopwatch& operator=(const Stopwatch&) = delete;

  private:
    using Clock = std::chrono::steady_clock;

    double& total_ms_;
    const Clock::time_point start_ = Clock::now();
};

class Generation {
  public:
    Generation(Session& session, const GenerationOptions& options, GenerationResult& result)
        : session_(session),
          engine_(session.engine()),
          options_(options),
          result_(result),
          sampler_(options.sampling, engine_.model().vocab_size),
          claim_(session),
          logits_(engine_.model().vocab_size) {}

    void run(const mla_token* prompt, size_t count) {
        try {
            prefill(prompt, count);
            for (size_t i = 0; i < count; ++i) sampler_.observe(prompt[i]);
            while (result_.finish_reason == MLA_FINISH_NONE) next();
        } catch (const Error& error) {
            result_.cache_bytes = engine_.info(session_).cache_bytes;
            if (error.status() != MLA_CANCELLED) throw;
            result_.finish_reason = MLA_FINISH_CANCELLED;
        }
        result_.cache_bytes = engine_.info(session_).cache_bytes;
    }

  private:
    // In steps of one chunk each, so that other sessions get their turn.
    void prefill(const mla_token* prompt, size_t count) {
        const Stopwatch stopwatch(result_.prefill_ms);
        size_t done = engine_.rewind_to_prefix(session_, prompt, count, &claim_);
        result_.reused_tokens = done;
        try {
            while (done < count) {
                const size_t size = std::min<size_t>(engine_.prefill_chunk(), count - done);
                step(prompt + done, size, done + size == count);
                done += size;
            }
        } catch (const Error& error) {
            if (error.status() != MLA_CANCELLED) {
                engine_.rewind(session_, result_.reused_tokens, &claim_);
            }
            throw;
        }
    }

    void next() {
        mla_token token = 0;
        {
            const Stopwatch stopwatch(result_.decode_ms);
            if (!result_.tokens.empty()) step(&result_.tokens.back(), 1, true);
            token = sampler_.pick(logits_.data());
            sampler_.observe(token);
            result_.tokens.push_back(token);
            result_.finish_reason = reason_to_finish(token);
        }
        const bool stop =
            options_.callback != nullptr && options_.callback(options_.user_data, token) != 0;
        if (stop && result_.finish_reason == MLA_FINISH_NONE) {
            result_.finish_reason = MLA_FINISH_CALLBACK;
        }
    }

    void step(const mla_token* tokens, size_t count, bool logits_wanted) {
        if (options_.cancellation != nullptr) options_.cancellation->check();
        Request request{&session_, tokens, count, {}, logits_.data()};
        if (logits_wanted) request.positions = {count - 1};
        engine_.step({request}, options_.cancellation, &claim_);
    }

    mla_finish_reason reason_to_finish(mla_token token) {
        const auto has = [&](const std::vector<mla_token>& ids) {
            return std::find(ids.begin(), ids.end(), token) != ids.end();
        };
        if (!options_.ignore_eos && has(engine_.model().eos_token_ids)) return MLA_FINISH_EOS;
        if (has(options_.stop_tokens)) return MLA_FINISH_STOP;
        if (result_.tokens.size() == options_.max_tokens) return MLA_FINISH_LENGTH;
        if (engine_.info(session_).room == 0) return MLA_FINISH_CONTEXT;
        return MLA_FINISH_NONE;
    }

    Session& session_;
    Engine& engine_;
    const GenerationOptions& options_;
    GenerationResult& result_;
    Sampler sampler_;
    const Claim claim_;
    std::vector<float> logits_;
};

}  // namespace

void generate(Session& session, const mla_token* prompt, size_t prompt_count,
              const GenerationOptions& options, GenerationResult& result) {
    session.engine().check_tokens(prompt, prompt_count);
    if (options.max_tokens == 0) {
        throw invalid("max_tokens is out of range").found(0).allowed("at least 1");
    }
    Generation(session, options, result).run(prompt, prompt_count);
}

}  // namespace mla::core
