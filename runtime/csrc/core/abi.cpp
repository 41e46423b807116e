#include "core/abi.h"

namespace mla::core {

uintptr_t next_handle() {
    static std::atomic<uintptr_t> last{0};
    return 16 * ++last;
}

namespace abi {

namespace {

thread_local std::string last_error;
thread_local const char* last_error_text = "there was no error in this thread";

// Bytes of the UTF-8 character at the start of `text`; 0: there is none. Overlong forms pass: the
// text is for reading.
size_t character_bytes(const char* text) {
    const auto first = static_cast<unsigned char>(*text);
    const size_t size = first < 0x80   ? 1
                        : first < 0xc2 ? 0
                        : first < 0xe0 ? 2
                        : first < 0xf0 ? 3
                        : first < 0xf5 ? 4
                                       : 0;
    for (size_t i = 1; i < size; ++i) {
        if ((static_cast<unsigned char>(text[i]) & 0xc0) != 0x80) return 0;
    }
    return size;
}

// Texts quote paths and damaged files, which may hold anything.
std::string readable(const char* text) {
    std::string result;
    while (*text != '\0') {
        const size_t size = character_bytes(text);
        result.append(size > 0 ? text : "?", std::max<size_t>(size, 1));
        text += std::max<size_t>(size, 1);
    }
    return result;
}

}  // namespace

Handles<mla_engine, Engine>& engines() {
    static auto& handles = *new Handles<mla_engine, Engine>("engine");
    return handles;
}

Handles<mla_session, Session>& sessions() {
    static auto& handles = *new Handles<mla_session, Session>("session");
    return handles;
}

Handles<mla_sampler, SharedSampler>& samplers() {
    static auto& handles = *new Handles<mla_sampler, SharedSampler>("sampler");
    return handles;
}

Handles<mla_cancellation, Cancellation>& cancellations() {
    static auto& handles = *new Handles<mla_cancellation, Cancellation>("cancellation");
    return handles;
}

mla_status remember(mla_status status, const char* text) noexcept {
    try {
        last_error = readable(text);
        last_error_text = last_error.c_str();
    } catch (...) {
        last_error_text = "there is not enough memory for the error's text";
    }
    return status;
}

std::string text_or_empty(const char* text) { return text == nullptr ? "" : text; }

SamplingOptions read_sampling(const mla_sampling_options* given) {
    SamplingOptions options;
    if (given == nullptr) return options;
    const mla_sampling_options read = read_struct(given, "the sampling options");
    options.temperature = read.temperature;
    options.top_p = read.top_p;
    options.min_p = read.min_p;
    options.repetition_penalty = read.repetition_penalty;
    options.top_k = read.top_k;
    if (read.seeded != 0) options.seed = read.seed;
    options.check();
    return options;
}

std::shared_ptr<Cancellation> optional_cancellation(mla_cancellation* handle) {
    return handle == nullptr ? nullptr : cancellations().find(handle);
}

}  // namespace abi
}  // namespace mla::core

using namespace mla::core;
using namespace mla::core::abi;

uint32_t mla_abi_version(void) { return MLA_ABI_VERSION; }

const char* mla_version(void) { return MLA_VERSION; }

const char* mla_last_error(void) { return last_error_text; }

mla_status mla_cancellation_create(mla_cancellation** cancellation) {
    return guarded([&] {
        need(cancellation, "cancellation") = cancellations().add(std::make_shared<Cancellation>());
    });
}

mla_status mla_cancellation_request(mla_cancellation* cancellation) {
    return guarded([&] { cancellations().find(cancellation)->request(); });
}

mla_status mla_cancellation_destroy(mla_cancellation* cancellation) {
    return guarded([&] { cancellations().remove(cancellation); });
}

mla_status mla_sampler_create(const mla_sampling_options* options, uint32_t vocab_size,
                              mla_sampler** sampler) {
    return guarded([&] {
        mla_sampler*& out = need(sampler, "sampler");
        const SamplingOptions read = read_sampling(options);
        if (vocab_size == 0 || vocab_size > 1u << 24) {
            throw invalid("vocab_size is out of range").found(vocab_size).allowed("1 to 16777216");
        }
        out = samplers().add(
            std::shared_ptr<SharedSampler>(new SharedSampler{{}, Sampler(read, vocab_size)}));
    });
}

mla_status mla_sampler_destroy(mla_sampler* sampler) {
    return guarded([&] { samplers().remove(sampler); });
}

namespace {

void check_logits(const Sampler& sampler, const float* logits, size_t vocab_size) {
    sampler.check_size(vocab_size);
    need_array(logits, vocab_size, "logits");
}

}  // namespace

mla_status mla_sampler_observe(mla_sampler* sampler, const mla_token* tokens, size_t count) {
    return guarded([&] {
        const auto shared = samplers().find(sampler);
        need_array(tokens, count, "tokens");
        const std::lock_guard<std::mutex> lock(shared->mutex);
        shared->sampler.observe(tokens, count);
    });
}

mla_status mla_sampler_pick(mla_sampler* sampler, const float* logits, size_t vocab_size,
                            mla_token* token) {
    return guarded([&] {
        const auto shared = samplers().find(sampler);
        check_logits(shared->sampler, logits, vocab_size);
        mla_token& out = need(token, "token");
        const std::lock_guard<std::mutex> lock(shared->mutex);
        out = shared->sampler.pick(logits);
    });
}

mla_status mla_sampler_distribution(mla_sampler* sampler, const float* logits, size_t vocab_size,
                                    mla_token* tokens, double* probabilities, size_t capacity,
                                    size_t* count) {
    return guarded([&] {
        const auto shared = samplers().find(sampler);
        check_logits(shared->sampler, logits, vocab_size);
        size_t& found_count = need(count, "count");
        const std::lock_guard<std::mutex> lock(shared->mutex);
        const Sampler::Distribution found = shared->sampler.distribution(logits);
        write_array(found.tokens, tokens, capacity);
        write_array(found.probabilities, probabilities, capacity);
        found_count = found.tokens.size();
    });
}
