// A model in memory: the graph, and the cache that its sessions share.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/bundle.h"
#include "core/cancellation.h"
#include "core/fair_mutex.h"
#include "core/graph.h"
#include "core/session.h"

namespace mla::core {

struct EngineOptions {
    std::string bundle;
    DecoderGraph::Options graph;
    std::optional<Device> device;  // must be what the bundle was exported for; none: that it is
    std::string cuda_library;      // for Device::kCuda: libmla_deploy_cuda.so
    uint64_t max_tokens = 0;       // 0: one session of the model's full context
    uint32_t prefill_chunk = 0;    // 0: 512
    bool verify = false;

    // Errors: MLA_INVALID_ARGUMENT.
    void check() const;
};

// New tokens of one session, and where their logits go.
struct Request {
    Session* session;
    const mla_token* tokens;
    size_t token_count;
    std::vector<size_t> positions;  // of the new tokens after which logits are wanted
    float* logits;                  // [positions.size(), vocab_size]
};

// Safe in any thread. The graph runs one step at a time.
class Engine : public std::enable_shared_from_this<Engine> {
  public:
    // Errors: MLA_INVALID_ARGUMENT, MLA_BAD_BUNDLE, MLA_BAD_GRAPH, MLA_BAD_KERNELS,
    // MLA_BAD_RUNTIME, MLA_OUT_OF_MEMORY.
    explicit Engine(const EngineOptions& options);

    const Bundle& bundle() const { return bundle_; }
    const ModelInfo& model() const { return bundle_.manifest.model; }
    const std::string& onnxruntime_version() const { return graph_.onnxruntime_version(); }
    uint32_t prefill_chunk() const { return prefill_chunk_; }
    uint64_t capacity_tokens() const { return arena_->capacity_tokens(); }
    uint64_t bytes_per_token() const { return arena_->page_bytes() / kPageTokens; }
    uint64_t free_tokens();

    // An empty session.
    std::shared_ptr<Session> session();

    // Another session of the same tokens and pages.
    std::shared_ptr<Session> fork(const Session& session);

    // Appends tokens, `prefill_chunk` of all sessions together at a time. After an error no session
    // has changed. Errors: see mla_step.
    void step(const std::vector<Request>& requests, Cancellation* cancellation,
              const Claim* claim = nullptr);

    // Forgets all tokens but the first `length`. Errors: MLA_INVALID_ARGUMENT, MLA_BUSY.
    void rewind(Session& session, size_t length, const Claim* claim = nullptr);

    // Forgets what differs from `tokens`, and the last one of them in any case, as it is to be
    // computed again for its logits; how many stay. Errors, and then nothing is forgotten:
    // MLA_BUSY, and if the rest of `tokens` would not fit, as `step`.
    size_t rewind_to_prefix(Session& session, const mla_token* tokens, size_t count,
                            const Claim* claim = nullptr);

    // How many tokens at the start of `tokens` the session holds.
    size_t common_prefix(const Session& session, const mla_token* tokens, size_t count);

    // Grows to `length` tokens without computing: whole pages of the cache are repeated, and their
    // tokens with them. For measuring: reading this cache takes the time that reading a real one
    // takes. Errors: MLA_INVALID_ARGUMENT (there is no whole page), MLA_CONTEXT_FULL,
    // MLA_CACHE_FULL, MLA_BUSY.
    void fill_by_copies(Session& session, size_t length);

    struct SessionInfo {
        uint64_t length, room, cache_bytes;
        uint64_t changes;  // how often the tokens have changed
    };
    SessionInfo info(const Session& session);
    std::vector<mla_token> tokens(const Session& session);

    // Errors: MLA_INVALID_ARGUMENT, if there are none or one is not of this model.
    void check_tokens(const mla_token* tokens, size_t count) const;
    Error not_in_vocabulary(int64_t token) const;

    template <class Length>
    static Error not_a_length(Length length, size_t held) {
        return invalid("a session cannot be rewound to there").found(length).allowed("0 to ", held);
    }

    template <class Position>
    static Error not_a_position(Position position, size_t token_count) {
        return invalid("a position is not among the new tokens")
            .found(position)
            .allowed("0 to ", token_count - 1);
    }

    // For session files. `pages`: those of a claimed session, which nobody writes to.
    struct Contents {
        std::vector<mla_token> tokens;
        std::vector<int64_t> pages;
    };
    Contents contents(const Session& session);
    PageArena& arena() { return *arena_; }

    // A session of `tokens` whose pages, all zero, are for the caller to fill.
    // Errors: MLA_CONTEXT_FULL, MLA_CACHE_FULL.
    std::shared_ptr<Session> reserved(std::vector<mla_token> tokens);

  private:
    friend class Claim;

    struct Feed {
        const Request* request;
        size_t past;
    };

    std::vector<Feed> feeds(const std::vector<Request>& requests, const Claim* claim);
    void reserve(const std::vector<Feed>& feeds);
    void run(const std::vector<Feed>& feeds, Cancellation* cancellation);
    void fill(const std::vector<Feed>& active, size_t done, size_t size);
    void check_context(size_t length, size_t count) const;
    void check_unclaimed(const Session& session, const Claim* claim) const;
    uint64_t room(const Session& session, size_t length) const;
    Error full(size_t count, const std::string& allowed) const;
    static size_t same(const Session& session, const mla_token* tokens, size_t count);
    static void truncate(Session& session, size_t length);

    const Bundle bundle_;
    const std::shared_ptr<PageArena> arena_;
    DecoderGraph graph_;  // is destroyed before the arena that it is bound to
    const uint32_t prefill_chunk_;
    FairMutex mutex_;  // guards what follows and what belongs to the sessions
    StepInputs inputs_;
};

}  // namespace mla::core
