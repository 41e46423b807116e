// runtime.h and text.h for C++: objects that close themselves, and exceptions. Header-only, C++17.
//
//     mla::Engine engine(options);
//     mla::Tokenizer tokenizer(bundle + "/tokenizer.json");
//     mla::Session session = engine.session();
//     mla::Generation made = session.generate(tokenizer.encode("The lighthouse keeper"));
//     std::string text = tokenizer.decode(made.tokens);
//
// Objects are moved, not copied; an object that was moved from may only be assigned to or
// destroyed. What the two say of threads holds here too. Only the exceptions cross no language
// boundary: they are thrown in this header, which is compiled with the program.
#ifndef MLA_DEPLOY_RUNTIME_HPP
#define MLA_DEPLOY_RUNTIME_HPP

#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "mla_deploy/runtime.h"
#include "mla_deploy/text.h"

namespace mla {

// A call that failed. what() says what was wrong, what is allowed and what to do next.
class Error : public std::runtime_error {
  public:
    Error(mla_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
    mla_status status() const noexcept { return status_; }

  private:
    mla_status status_;
};

inline void check(mla_status status) {
    if (status != MLA_OK) throw Error(status, mla_last_error());
}

namespace detail {

template <class Handle, mla_status (*Close)(Handle*)>
struct Closer {
    void operator()(Handle* handle) const noexcept { Close(handle); }
};

template <class Handle, mla_status (*Close)(Handle*)>
using Owned = std::unique_ptr<Handle, Closer<Handle, Close>>;

}  // namespace detail

// Stops the calls of other threads that were given it. One for each request.
class Cancellation {
  public:
    Cancellation() {
        mla_cancellation* handle = nullptr;
        check(mla_cancellation_create(&handle));
        handle_.reset(handle);
    }
    void request() { check(mla_cancellation_request(handle_.get())); }
    mla_cancellation* get() const noexcept { return handle_.get(); }

  private:
    detail::Owned<mla_cancellation, mla_cancellation_destroy> handle_;
};

// The fields of mla_sampling_options, greedy unless changed.
struct Sampling {
    double temperature = 0;
    std::uint32_t top_k = 0;
    double top_p = 1;
    double min_p = 0;
    double repetition_penalty = 1;
    std::optional<std::uint64_t> seed;

    mla_sampling_options c_options() const noexcept {
        mla_sampling_options options = MLA_SAMPLING_OPTIONS_INIT;
        options.temperature = temperature;
        options.top_k = top_k;
        options.top_p = top_p;
        options.min_p = min_p;
        options.repetition_penalty = repetition_penalty;
        options.seeded = seed.has_value();
        options.seed = seed.value_or(0);
        return options;
    }
};

// The fields of mla_generate_options.
struct GenerateOptions {
    Sampling sampling;
    std::uint32_t max_tokens = 256;
    std::vector<mla_token> stop_tokens;
    bool ignore_eos = false;
    // Gets each new token; false: stop. What it throws comes out of `generate`.
    std::function<bool(mla_token)> on_token;
    const Cancellation* cancellation = nullptr;
};

struct Generation {
    std::vector<mla_token> tokens;
    mla_finish_reason finish_reason = MLA_FINISH_NONE;
    std::uint64_t prompt_tokens = 0;
    std::uint64_t reused_tokens = 0;
    double prefill_ms = 0;
    double decode_ms = 0;
    std::uint64_t cache_bytes = 0;
};

// A sequence of tokens in the cache. Made by Engine.
class Session {
  public:
    // Takes the handle over.
    Session(mla_session* handle, std::size_t vocab_size)
        : handle_(handle), vocab_size_(vocab_size) {}

    mla_session_info info() const {
        mla_session_info info = MLA_SESSION_INFO_INIT;
        check(mla_session_get_info(handle_.get(), &info));
        return info;
    }
    std::size_t length() const { return static_cast<std::size_t>(info().length); }

    std::vector<mla_token> tokens() const {
        std::vector<mla_token> tokens(length());
        std::size_t count = 0;
        check(mla_session_tokens(handle_.get(), tokens.data(), tokens.size(), &count));
        return tokens;
    }

    // Appends tokens; the logits after the last one.
    std::vector<float> prefill(const std::vector<mla_token>& tokens) {
        std::vector<float> logits(vocab_size_);
        check(mla_session_prefill(handle_.get(), tokens.data(), tokens.size(), logits.data(),
                                  logits.size()));
        return logits;
    }
    std::vector<float> decode(mla_token token) { return prefill({token}); }

    void rewind(std::size_t length) { check(mla_session_rewind(handle_.get(), length)); }

    Session fork() const {
        mla_session* handle = nullptr;
        check(mla_session_fork(handle_.get(), &handle));
        return Session(handle, vocab_size_);
    }

    void save(const std::string& path) const {
        check(mla_session_save(handle_.get(), path.c_str()));
    }

    Generation generate(const std::vector<mla_token>& prompt, const GenerateOptions& options = {}) {
        Callback callback{options.on_token, nullptr};
        const mla_sampling_options sampling = options.sampling.c_options();
        mla_generate_options c_options = MLA_GENERATE_OPTIONS_INIT;
        c_options.sampling = &sampling;
        c_options.stop_tokens = options.stop_tokens.data();
        c_options.stop_token_count = options.stop_tokens.size();
        c_options.max_tokens = options.max_tokens;
        c_options.ignore_eos = options.ignore_eos;
        if (options.on_token) c_options.callback = &Callback::call;
        c_options.user_data = &callback;
        if (options.cancellation != nullptr) c_options.cancellation = options.cancellation->get();

        Generation made;
        made.tokens.resize(options.max_tokens);
        mla_generation generation = MLA_GENERATION_INIT;
        generation.tokens = made.tokens.data();
        generation.capacity = made.tokens.size();
        const mla_status status =
            mla_generate(handle_.get(), prompt.data(), prompt.size(), &c_options, &generation);
        if (callback.thrown) std::rethrow_exception(callback.thrown);
        check(status);
        made.tokens.resize(generation.token_count);
        made.finish_reason = generation.finish_reason;
        made.prompt_tokens = generation.prompt_tokens;
        made.reused_tokens = generation.reused_tokens;
        made.prefill_ms = generation.prefill_ms;
        made.decode_ms = generation.decode_ms;
        made.cache_bytes = generation.cache_bytes;
        return made;
    }

    mla_session* get() const noexcept { return handle_.get(); }

  private:
    // No exception may go through the library.
    struct Callback {
        const std::function<bool(mla_token)>& function;
        std::exception_ptr thrown;

        static int call(void* self, mla_token token) noexcept {
            auto& callback = *static_cast<Callback*>(self);
            try {
                return callback.function(token) ? 0 : 1;
            } catch (...) {
                callback.thrown = std::current_exception();
                return 1;
            }
        }
    };

    detail::Owned<mla_session, mla_session_destroy> handle_;
    std::size_t vocab_size_;
};

// A bundle in memory. Sessions may outlive it.
class Engine {
  public:
    // options: MLA_ENGINE_OPTIONS_INIT, with bundle and onnxruntime_library set.
    explicit Engine(const mla_engine_options& options) {
        if (mla_abi_version() != MLA_ABI_VERSION) {
            throw Error(MLA_BAD_RUNTIME,
                        "libmla_deploy.so is of another ABI version than the "
                        "headers this program was built with: rebuild it");
        }
        mla_engine* handle = nullptr;
        check(mla_engine_open(&options, &handle));
        handle_.reset(handle);
        vocab_size_ = info().vocab_size;
    }

    mla_engine_info info() const {
        mla_engine_info info = MLA_ENGINE_INFO_INIT;
        check(mla_engine_get_info(handle_.get(), &info));
        return info;
    }

    std::vector<mla_token> eos_tokens() const {
        std::size_t count = 0;
        check(mla_engine_eos_tokens(handle_.get(), nullptr, 0, &count));
        std::vector<mla_token> tokens(count);
        check(mla_engine_eos_tokens(handle_.get(), tokens.data(), count, &count));
        return tokens;
    }

    Session session() const {
        mla_session* handle = nullptr;
        check(mla_session_create(handle_.get(), &handle));
        return Session(handle, vocab_size_);
    }

    Session load(const std::string& path) const {
        mla_session* handle = nullptr;
        check(mla_session_load(handle_.get(), path.c_str(), &handle));
        return Session(handle, vocab_size_);
    }

    // One more token for each of several sessions; the logits, [sessions, vocab_size].
    std::vector<float> decode(const std::vector<Session*>& sessions,
                              const std::vector<mla_token>& tokens) const {
        if (sessions.size() != tokens.size()) {
            throw Error(MLA_INVALID_ARGUMENT, "every session needs one token");
        }
        std::vector<float> logits(sessions.size() * vocab_size_);
        std::vector<mla_request> requests;
        for (std::size_t i = 0; i < sessions.size(); ++i) {
            mla_request request = MLA_REQUEST_INIT;
            request.session = sessions[i]->get();
            request.tokens = &tokens[i];
            request.token_count = 1;
            request.logits = logits.data() + i * vocab_size_;
            request.logits_capacity = vocab_size_;
            requests.push_back(request);
        }
        check(mla_step(handle_.get(), requests.data(), requests.size(), nullptr));
        return logits;
    }

    mla_engine* get() const noexcept { return handle_.get(); }

  private:
    detail::Owned<mla_engine, mla_engine_close> handle_;
    std::size_t vocab_size_ = 0;
};

// Picks tokens, for loops of one's own.
class Sampler {
  public:
    Sampler(const Sampling& sampling, std::uint32_t vocab_size) {
        const mla_sampling_options options = sampling.c_options();
        mla_sampler* handle = nullptr;
        check(mla_sampler_create(&options, vocab_size, &handle));
        handle_.reset(handle);
    }
    void observe(const std::vector<mla_token>& tokens) {
        check(mla_sampler_observe(handle_.get(), tokens.data(), tokens.size()));
    }
    mla_token pick(const std::vector<float>& logits) {
        mla_token token = 0;
        check(mla_sampler_pick(handle_.get(), logits.data(), logits.size(), &token));
        return token;
    }

  private:
    detail::Owned<mla_sampler, mla_sampler_destroy> handle_;
};

// Text to token ids, and back. Sessions of one thread and streams of another may share it.
class Tokenizer {
  public:
    // path: of a tokenizer.json, such as that of a bundle.
    explicit Tokenizer(const std::string& path) {
        mla_tokenizer* handle = nullptr;
        check(mla_tokenizer_open(path.c_str(), &handle));
        handle_.reset(handle);
    }

    std::uint32_t vocab_size() const {
        std::uint32_t size = 0;
        check(mla_tokenizer_vocab_size(handle_.get(), &size));
        return size;
    }

    // The id of a token by its exact content; nothing if there is no such token.
    std::optional<mla_token> token_id(std::string_view content) const {
        mla_token id = 0;
        const mla_status status =
            mla_tokenizer_token_id(handle_.get(), content.data(), content.size(), &id);
        if (status == MLA_NOT_FOUND) return std::nullopt;
        check(status);
        return id;
    }

    // add_special_tokens: with what the model wants around a text, such as a leading <s>.
    std::vector<mla_token> encode(std::string_view text, bool add_special_tokens = true) const {
        std::vector<mla_token> ids(text.size() + 16);
        grow(ids, [&](std::size_t& count) {
            return mla_tokenizer_encode(handle_.get(), text.data(), text.size(), add_special_tokens,
                                        ids.data(), ids.size(), &count);
        });
        return ids;
    }

    std::string decode(const std::vector<mla_token>& ids, bool skip_special_tokens = true) const {
        std::string text(8 * ids.size() + 16, '\0');
        grow(text, [&](std::size_t& length) {
            return mla_tokenizer_decode(handle_.get(), ids.data(), ids.size(), skip_special_tokens,
                                        text.data(), text.size(), &length);
        });
        return text;
    }

    mla_tokenizer* get() const noexcept { return handle_.get(); }

  private:
    // Calls again with room for all, if there was too little.
    template <class Out, class Call>
    static void grow(Out& out, const Call& call) {
        std::size_t size = 0;
        mla_status status = call(size);
        if (status == MLA_BUFFER_TOO_SMALL) {
            out.resize(size);
            status = call(size);
        }
        check(status);
        out.resize(size);
    }

    detail::Owned<mla_tokenizer, mla_tokenizer_close> handle_;
};

// Text as tokens come, never half a character. It may outlive its tokenizer.
class TextStream {
  public:
    explicit TextStream(const Tokenizer& tokenizer, bool skip_special_tokens = true) {
        mla_text_stream* handle = nullptr;
        check(mla_text_stream_create(tokenizer.get(), skip_special_tokens, &handle));
        handle_.reset(handle);
    }

    // What is complete now, often nothing; valid until the next call on the stream.
    std::string_view push(mla_token id) {
        const char* text = nullptr;
        std::size_t length = 0;
        check(mla_text_stream_push(handle_.get(), id, &text, &length));
        return {text, length};
    }

    // The rest, when no more tokens come. The stream is then as new.
    std::string_view flush() {
        const char* text = nullptr;
        std::size_t length = 0;
        check(mla_text_stream_flush(handle_.get(), &text, &length));
        return {text, length};
    }

  private:
    detail::Owned<mla_text_stream, mla_text_stream_destroy> handle_;
};

}  // namespace mla

#endif  // MLA_DEPLOY_RUNTIME_HPP
