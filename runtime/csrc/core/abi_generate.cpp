// The C ABI's mla_generate.
#include "core/abi.h"
#include "core/generation.h"

using namespace mla::core;
using namespace mla::core::abi;

namespace {

GenerationOptions read_options(const mla_generate_options* given) {
    GenerationOptions options;
    if (given == nullptr) return options;
    const mla_generate_options read = read_struct(given, "the generation options");
    options.sampling = read_sampling(read.sampling);
    need_array(read.stop_tokens, read.stop_token_count, "stop_tokens");
    options.stop_tokens.assign(read.stop_tokens, read.stop_tokens + read.stop_token_count);
    options.max_tokens = read.max_tokens;
    options.ignore_eos = read.ignore_eos != 0;
    return options;
}

}  // namespace

mla_status mla_generate(mla_session* session, const mla_token* prompt, size_t prompt_count,
                        const mla_generate_options* options, mla_generation* generation) {
    return guarded([&] {
        const auto found = sessions().find(session);
        mla_generation filled = read_struct(generation, "the generation");
        const GenerationOptions read = read_options(options);
        std::shared_ptr<Cancellation> cancel;
        std::function<bool(mla_token)> on_token;
        if (options != nullptr) {
            cancel = optional_cancellation(options->cancellation);
            if (options->callback != nullptr) {
                on_token = [callback = options->callback, data = options->user_data](
                               mla_token token) { return callback(data, token) != 0; };
            }
        }
        need_array(prompt, prompt_count, "prompt");
        if (filled.tokens != nullptr && filled.capacity < read.max_tokens) {
            throw invalid("the place for the tokens is too small")
                .found(filled.capacity)
                .allowed("max_tokens, ", read.max_tokens, ", or more");
        }
        GenerationResult result;
        const auto fill = [&] {
            filled.token_count = result.tokens.size();
            filled.prompt_tokens = prompt_count;
            filled.reused_tokens = result.reused_tokens;
            filled.prefill_ms = result.prefill_ms;
            filled.decode_ms = result.decode_ms;
            filled.cache_bytes = result.cache_bytes;
            filled.finish_reason = result.finish_reason;
            if (filled.tokens != nullptr) {
                std::copy(result.tokens.begin(), result.tokens.end(), filled.tokens);
            }
            write_struct(generation, filled);
        };
        try {
            generate(found, {prompt, prompt + prompt_count}, read, on_token, cancel.get(), result);
        } catch (...) {
            fill();
            throw;
        }
        fill();
    });
}
