#include "core/generation.h"

#include <algorithm>
#include <chrono>
#include <utility>

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

}  // namespace

Generation::Generation(std::shared_ptr<Session> session, std::vector<mla_token> prompt,
                       const GenerationOptions& options)
    : session_(std::move(session)),
      prompt_(std::move(prompt)),
      options_(options),
      sampler_(options.sampling, session_->engine().model().vocab_size),
      logits_(session_->engine().model().vocab_size) {
    session_->engine().check_tokens(prompt_.data(), prompt_.size());
    if (options_.max_tokens == 0) {
        throw invalid("max_tokens is out of range").found(0).allowed("at least 1");
    }
}

bool Generation::next(const Claim& claim, Cancellation* cancellation) {
    if (ended_) return false;
    ended_ = true;  // unless this succeeds
    try {
        if (result_.tokens.empty()) prefill(claim, cancellation);
        decode(claim, cancellation);
    } catch (const Error& error) {
        note_session();
        if (error.status() != MLA_CANCELLED) throw;
        result_.finish_reason = MLA_FINISH_CANCELLED;
        return false;
    }
    ended_ = result_.finish_reason != MLA_FINISH_NONE;
    return true;
}

void Generation::finish(mla_finish_reason reason) {
    ended_ = true;
    result_.finish_reason = reason;
}

// In steps of one chunk each, so that other sessions get their turn.
void Generation::prefill(const Claim& claim, Cancellation* cancellation) {
    const Stopwatch stopwatch(result_.prefill_ms);
    Engine& engine = session_->engine();
    const size_t count = prompt_.size();
    size_t done = engine.rewind_to_prefix(*session_, prompt_.data(), count, &claim);
    result_.reused_tokens = done;
    try {
        while (done < count) {
            const size_t size = std::min<size_t>(engine.prefill_chunk(), count - done);
            step(prompt_.data() + done, size, done + size == count, claim, cancellation);
            done += size;
        }
    } catch (const Error& error) {
        if (error.status() != MLA_CANCELLED) {
            engine.rewind(*session_, result_.reused_tokens, &claim);
        }
        throw;
    }
    sampler_.observe(prompt_.data(), count);
}

void Generation::decode(const Claim& claim, Cancellation* cancellation) {
    const Stopwatch stopwatch(result_.decode_ms);
    if (!result_.tokens.empty()) {
        if (session_->engine().info(*session_).changes != session_changes_) {
            throw Error(MLA_BUSY, "the session was changed while a generation is under way on it")
                .next("start the generation anew, or work on a fork");
        }
        step(&result_.tokens.back(), 1, true, claim, cancellation);
    }
    const mla_token token = sampler_.pick(logits_.data());
    sampler_.observe(token);
    result_.tokens.push_back(token);
    result_.finish_reason = reason_to_finish(token, note_session().room);
}

void Generation::step(const mla_token* tokens, size_t count, bool logits_wanted, const Claim& claim,
                      Cancellation* cancellation) {
    if (cancellation != nullptr) cancellation->check();
    Request request{session_.get(), tokens, count, {}, logits_.data()};
    if (logits_wanted) request.positions = {count - 1};
    session_->engine().step({request}, cancellation, &claim);
}

mla_finish_reason Generation::reason_to_finish(mla_token token, uint64_t room) const {
    const auto has = [&](const std::vector<mla_token>& ids) {
        return std::find(ids.begin(), ids.end(), token) != ids.end();
    };
    if (!options_.ignore_eos && has(session_->engine().model().eos_token_ids)) {
        return MLA_FINISH_EOS;
    }
    if (has(options_.stop_tokens)) return MLA_FINISH_STOP;
    if (result_.tokens.size() == options_.max_tokens) return MLA_FINISH_LENGTH;
    return room == 0 ? MLA_FINISH_CONTEXT : MLA_FINISH_NONE;
}

Engine::SessionInfo Generation::note_session() {
    const Engine::SessionInfo info = session_->engine().info(*session_);
    session_changes_ = info.changes;
    result_.cache_bytes = info.cache_bytes;
    return info;
}

void generate(std::shared_ptr<Session> session, std::vector<mla_token> prompt,
              const GenerationOptions& options, const std::function<bool(mla_token)>& on_token,
              Cancellation* cancellation, GenerationResult& result) {
    Generation generation(std::move(session), std::move(prompt), options);
    const Claim claim(generation.session());
    try {
        while (generation.next(claim, cancellation)) {
            const bool stop = on_token && on_token(generation.result().tokens.back());
            if (stop && generation.result().finish_reason == MLA_FINISH_NONE) {
                generation.finish(MLA_FINISH_CALLBACK);
            }
        }
    } catch (...) {
        result = generation.result();
        throw;
    }
    result = generation.result();
}

}  // namespace mla::core
