#include "core/engine.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <set>

#include "core/error.h"

namespace mla::core {

namespace {

constexpr uint32_t kPrefillChunk = 512;

using Lock = std::lock_guard<FairMutex>;

std::shared_ptr<CacheMemory> memory_for(const EngineOptions& options, const Bundle& bundle) {
    const Device target = bundle.manifest.device, device = options.device.value_or(target);
    if (device != target) {
        throw Error(MLA_BAD_BUNDLE,
                    join(bundle.folder, " was not exported for the device ", name_of(device)))
            .found("target ", name_of(target))
            .next("mla-deploy export MODEL -o BUNDLE --to onnx --target ", name_of(device),
                  ", or open it with the device ", name_of(target));
    }
    if (device == Device::kCpu) return host_memory();
    if (options.cuda_library.empty()) {
        throw invalid("the device cuda needs cuda_library")
            .next("name libmla_deploy_cuda.so, which is built with -DMLA_CUDA=ON");
    }
    return cuda_memory(options.cuda_library);
}

}  // namespace

Claim::Claim(Session& session) : session_(session) {
    const Lock lock(session.engine().mutex_);
    session.engine().check_unclaimed(session, nullptr);
    session.claim_ = this;
}

Claim::~Claim() {
    const Lock lock(session_.engine().mutex_);
    session_.claim_ = nullptr;
}

void EngineOptions::check() const {
    constexpr uint32_t kMostThreads = 1024, kLargestChunk = 1 << 20;
    if (graph.threads > kMostThreads) {
        throw invalid("threads is out of range")
            .found(graph.threads)
            .allowed("0 to ", kMostThreads, "; 0: one a physical core");
    }
    if (prefill_chunk > kLargestChunk) {
        throw invalid("prefill_chunk is out of range")
            .found(prefill_chunk)
            .allowed("0 to ", kLargestChunk, "; 0: ", kPrefillChunk);
    }
}

Engine::Engine(const EngineOptions& options)
    : bundle_((options.check(), Bundle::open(options.bundle, options.verify))),
      arena_(std::make_shared<PageArena>(
          bundle_.manifest.cache,
          options.max_tokens > 0 ? options.max_tokens : model().max_position_embeddings,
          memory_for(options, bundle_))),
      graph_(bundle_, options.graph),
      prefill_chunk_(options.prefill_chunk > 0 ? options.prefill_chunk : kPrefillChunk) {
    graph_.bind_cache(*arena_);
}

uint64_t Engine::free_tokens() {
    const Lock lock(mutex_);
    return arena_->free_pages() * kPageTokens;
}

std::shared_ptr<Session> Engine::session() {
    return std::make_shared<Session>(shared_from_this(), arena_);
}

std::shared_ptr<Session> Engine::fork(const Session& session) {
    const auto made = this->session();
    const Lock lock(mutex_);
    made->tokens_ = session.tokens_;
    made->pages_.share(session.pages_);
    return made;
}

void Engine::step(const std::vector<Request>& requests, Cancellation* cancellation,
                  const Claim* claim) {
    if (requests.empty()) return;
    const Lock lock(mutex_);
    const std::vector<Feed> feeds = this->feeds(requests, claim);
    try {
        reserve(feeds);
        run(feeds, cancellation);
    } catch (...) {
        for (const Feed& feed : feeds) truncate(*feed.request->session, feed.past);
        throw;
    }
}

std::vector<Engine::Feed> Engine::feeds(const std::vector<Request>& requests, const Claim* claim) {
    std::vector<Feed> feeds;
    std::set<const Session*> met;
    for (const Request& request : requests) {
        const Session& session = *request.session;
        if (&session.engine() != this) {
            throw invalid("a session belongs to the engine that made it");
        }
        if (!met.insert(&session).second) {
            throw invalid("a session can be only once in a step").next("fork it");
        }
        check_unclaimed(session, claim);
        check_tokens(request.tokens, request.token_count);
        check_context(session.tokens_.size(), request.token_count);
        for (const size_t position : request.positions) {
            if (position >= request.token_count) {
                throw not_a_position(position, request.token_count);
            }
        }
        feeds.push_back({&request, session.tokens_.size()});
    }
    return feeds;
}

void Engine::reserve(const std::vector<Feed>& feeds) {
    size_t count = 0;
    std::vector<PageTable::Growth> growths;
    for (const Feed& feed : feeds) {
        Session& session = *feed.request->session;
        const size_t length = feed.past + feed.request->token_count;
        session.tokens_.reserve(length);  // so that noting the tokens cannot fail
        growths.push_back({&session.pages_, feed.past, length});
        count += feed.request->token_count;
    }
    if (PageTable::reserve(growths)) return;
    throw full(count,
               feeds.size() == 1
                   ? join(room(*feeds[0].request->session, feeds[0].past), " for this session")
                   : join(arena_->free_pages() * kPageTokens,
                          " in free pages, besides what the sessions' last pages hold"));
}

void Engine::run(const std::vector<Feed>& feeds, Cancellation* cancellation) {
    const size_t vocab_size = model().vocab_size;
    std::vector<Feed> active = feeds;
    for (size_t done = 0; !active.empty();) {
        // At most prefill_chunk tokens at once, whatever the number of sessions.
        const size_t size = std::max<size_t>(1, prefill_chunk_ / active.size());
        fill(active, done, size);
        const float* logits = graph_.run(inputs_, cancellation);
        for (const Feed& feed : active) {
            const Request& request = *feed.request;
            const float* next = logits;
            for (size_t row = 0; row < request.positions.size(); ++row) {
                const size_t position = request.positions[row];
                if (position < done || position >= done + size) continue;
                std::memcpy(request.logits + row * vocab_size, next, vocab_size * sizeof(float));
                next += vocab_size;
            }
            logits += static_cast<size_t>(inputs_.logits) * vocab_size;
            const size_t end = std::min(done + size, request.token_count);
            auto& tokens = request.session->tokens_;
            ++request.session->changes_;
            tokens.insert(tokens.end(), request.tokens + done, request.tokens + end);
        }
        done += size;
        active.erase(
            std::remove_if(active.begin(), active.end(),
                           [&](const Feed& feed) { return feed.request->token_count <= done; }),
            active.end());
    }
}

// The inputs for up to `size` tokens of each request, after the first `done`; rows are padded on
// the right to the longest.
void Engine::fill(const std::vector<Feed>& active, size_t done, size_t size) {
    StepInputs& in = inputs_;
    in.batch = static_cast<int64_t>(active.size());
    in.steps = in.pages = in.logits = 1;
    in.past_lengths.clear();
    in.new_lengths.clear();
    std::vector<std::vector<int64_t>> wanted;
    for (const Feed& feed : active) {
        const Request& request = *feed.request;
        const auto count = static_cast<int64_t>(std::min(size, request.token_count - done));
        in.past_lengths.push_back(static_cast<int64_t>(feed.past + done));
        in.new_lengths.push_back(count);
        wanted.emplace_back();
        for (const size_t position : request.positions) {
            if (position < done || position >= done + size) continue;
            wanted.back().push_back(static_cast<int64_t>(position - done));
        }
        const auto pages = static_cast<int64_t>(request.session->pages_.pages().size());
        in.steps = std::max(in.steps, count);
        in.pages = std::max(in.pages, pages);
        in.logits = std::max(in.logits, static_cast<int64_t>(wanted.back().size()));
    }
    in.pages = graph_.pages_for(in.steps, in.logits, in.pages);
    in.input_ids.assign(static_cast<size_t>(in.batch * in.steps), 0);
    in.block_table.assign(static_cast<size_t>(in.batch * in.pages), kScratchPage);
    in.logit_index.assign(static_cast<size_t>(in.batch * in.logits), 0);
    for (size_t b = 0; b < active.size(); ++b) {
        const auto at = static_cast<std::ptrdiff_t>(b);
        const mla_token* tokens = active[b].request->tokens + done;
        const auto& pages = active[b].request->session->pages_.pages();
        std::copy(tokens, tokens + in.new_lengths[b], in.input_ids.begin() + at * in.steps);
        std::copy(pages.begin(), pages.end(), in.block_table.begin() + at * in.pages);
        std::copy(wanted[b].begin(), wanted[b].end(), in.logit_index.begin() + at * in.logits);
    }
}

void Engine::rewind(Session& session, size_t length, const Claim* claim) {
    const Lock lock(mutex_);
    check_unclaimed(session, claim);
    if (length > session.tokens_.size()) throw not_a_length(length, session.tokens_.size());
    truncate(session, length);
}

size_t Engine::rewind_to_prefix(Session& session, const mla_token* tokens, size_t count,
                                const Claim* claim) {
    const Lock lock(mutex_);
    check_unclaimed(session, claim);
    const size_t same = this->same(session, tokens, count - 1);
    check_context(same, count - same);
    const uint64_t room = this->room(session, same);
    if (count - same > room) throw full(count - same, join(room, " for this session"));
    truncate(session, same);
    return same;
}

size_t Engine::common_prefix(const Session& session, const mla_token* tokens, size_t count) {
    const Lock lock(mutex_);
    return same(session, tokens, count);
}

size_t Engine::same(const Session& session, const mla_token* tokens, size_t count) {
    const size_t most = std::min(count, session.tokens_.size());
    return static_cast<size_t>(std::mismatch(tokens, tokens + most, session.tokens_.begin()).first -
                               tokens);
}

void Engine::fill_by_copies(Session& session, size_t length) {
    const Lock lock(mutex_);
    check_unclaimed(session, nullptr);
    auto& tokens = session.tokens_;
    if (length <= tokens.size()) return;
    const size_t whole = tokens.size() / kPageTokens * kPageTokens;
    if (whole == 0) {
        throw invalid("there is no whole page to copy")
            .found(tokens.size(), " tokens")
            .allowed(kPageTokens, " or more")
            .next("prefill more tokens first");
    }
    check_context(whole, length - whole);
    const uint64_t room = this->room(session, whole);
    if (length - whole > room) throw full(length - whole, join(room, " for this session"));
    tokens.reserve(length);
    truncate(session, whole);
    if (!session.pages_.extend_by_copies(length)) throw full(length - whole, "fewer");
    while (tokens.size() < length) tokens.push_back(tokens[tokens.size() - whole]);
    ++session.changes_;
}

Engine::SessionInfo Engine::info(const Session& session) {
    const Lock lock(mutex_);
    return {session.tokens_.size(), room(session, session.tokens_.size()),
            session.pages_.cache_bytes(), session.changes_};
}

std::vector<mla_token> Engine::tokens(const Session& session) {
    const Lock lock(mutex_);
    return session.tokens_;
}

void Engine::check_tokens(const mla_token* tokens, size_t count) const {
    if (count == 0) throw invalid("there are no tokens").next("give at least one");
    const auto vocab_size = static_cast<mla_token>(model().vocab_size);  // at most 2^24
    const auto* bad = std::find_if(tokens, tokens + count,
                                   [&](mla_token id) { return id < 0 || id >= vocab_size; });
    if (bad != tokens + count) throw not_in_vocabulary(*bad);
}

Error Engine::not_in_vocabulary(int64_t token) const {
    return invalid("a token is not in the model's vocabulary")
        .found(token)
        .allowed("0 to ", model().vocab_size - 1)
        .next("use the tokenizer of the bundle");
}

Engine::Contents Engine::contents(const Session& session) {
    const Lock lock(mutex_);
    return {session.tokens_, session.pages_.pages()};
}

std::shared_ptr<Session> Engine::reserved(std::vector<mla_token> tokens) {
    const auto made = session();
    const Lock lock(mutex_);
    check_context(0, tokens.size());
    if (!PageTable::reserve({{&made->pages_, 0, tokens.size()}})) {
        throw full(tokens.size(), join(room(*made, 0), " for this session"));
    }
    made->tokens_ = std::move(tokens);
    return made;
}

void Engine::check_context(size_t length, size_t count) const {
    const size_t limit = model().max_position_embeddings;
    if (count <= limit && length <= limit - count) return;
    throw Error(MLA_CONTEXT_FULL, "the model's context is too short")
        .found(length, " tokens in the session and ", count, " new ones")
        .allowed(limit, " together")
        .next("shorten the prompt, or rewind the session");
}

void Engine::check_unclaimed(const Session& session, const Claim* claim) const {
    if (session.claim_ == claim || session.claim_ == nullptr) return;
    throw Error(MLA_BUSY, "a generation or save is under way on the session")
        .next("wait until it has ended, or work on a fork");
}

// As if the session had been rewound to `length`.
uint64_t Engine::room(const Session& session, size_t length) const {
    const uint64_t left = model().max_position_embeddings - length;
    return std::min(left, session.pages_.room(length));
}

Error Engine::full(size_t count, const std::string& allowed) const {
    return Error(MLA_CACHE_FULL, "the cache is full")
        .found(count, " new tokens")
        .allowed(allowed)
        .next("open the bundle with max_tokens above ", capacity_tokens(),
              ", or destroy or rewind a session");
}

void Engine::truncate(Session& session, size_t length) {
    session.pages_.truncate(length);
    session.changes_ += length != session.tokens_.size();
    session.tokens_.resize(length);
}

}  // namespace mla::core
