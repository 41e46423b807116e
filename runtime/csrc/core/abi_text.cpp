// The C ABI's functions on text: mla_deploy/text.h.
#include <cerrno>
#include <cstdio>

#include "core/abi.h"
#include "mla_deploy/text.h"
#include "text/stream.h"
#include "text/tokenizer.h"

using namespace mla::core;
using namespace mla::core::abi;
using mla::text::Stream;
using mla::text::Tokenizer;

namespace {

struct LockedStream {
    LockedStream(std::shared_ptr<const Tokenizer> tokenizer, bool skip)
        : stream(std::move(tokenizer), skip) {}
    std::mutex mutex;
    Stream stream;
};

// Never destroyed: threads may outlive main.
Handles<mla_tokenizer, const Tokenizer>& tokenizers() {
    static auto& handles = *new Handles<mla_tokenizer, const Tokenizer>("tokenizer");
    return handles;
}

Handles<mla_text_stream, LockedStream>& streams() {
    static auto& handles = *new Handles<mla_text_stream, LockedStream>("text stream");
    return handles;
}

// The results, or how many there are.
template <class Out, class In>
void copy_out(const In* from, size_t size, Out* to, size_t capacity, size_t& count) {
    count = size;
    if (size > capacity) {
        throw Error(MLA_BUFFER_TOO_SMALL, "the buffer is too small")
            .found(capacity)
            .allowed("at least ", size)
            .next("call again with a buffer of that size");
    }
    std::copy(from, from + size, to);
}

std::string read_file(const char* path) {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path, "rb"), std::fclose);
    std::string bytes;
    char part[1 << 16];
    while (file) {
        const size_t size = std::fread(part, 1, sizeof(part), file.get());
        bytes.append(part, size);
        if (size < sizeof(part)) break;
    }
    if (!file || std::ferror(file.get())) {
        throw Error(MLA_FILE_ERROR, join("cannot read ", path))
            .found(std::strerror(errno))
            .next("check that it is a file, and that it may be read");
    }
    return bytes;
}

// Gives a piece of a stream to the caller, who may read it until the next call on the stream.
template <class Call>
void give_piece(mla_text_stream* stream, const char** text, size_t* length, const Call& call) {
    const auto found = streams().find(stream);
    const char*& out = need(text, "text");
    size_t& size = need(length, "length");
    const std::lock_guard<std::mutex> lock(found->mutex);
    const std::string& piece = call(found->stream);
    out = piece.c_str();
    size = piece.size();
}

}  // namespace

mla_status mla_tokenizer_open(const char* path, mla_tokenizer** tokenizer) {
    return guarded([&] {
        need(path, "path");
        mla_tokenizer*& out = need(tokenizer, "tokenizer");
        out = tokenizers().add(Tokenizer::parse(read_file(path)));
    });
}

mla_status mla_tokenizer_open_bytes(const char* json, size_t size, mla_tokenizer** tokenizer) {
    return guarded([&] {
        need_array(json, size, "json");
        mla_tokenizer*& out = need(tokenizer, "tokenizer");
        out = tokenizers().add(Tokenizer::parse({json, size}));
    });
}

mla_status mla_tokenizer_close(mla_tokenizer* tokenizer) {
    return guarded([&] { tokenizers().remove(tokenizer); });
}

mla_status mla_tokenizer_vocab_size(mla_tokenizer* tokenizer, uint32_t* size) {
    return guarded([&] {
        const auto found = tokenizers().find(tokenizer);
        need(size, "size") = found->vocab_size();
    });
}

mla_status mla_tokenizer_token_id(mla_tokenizer* tokenizer, const char* content, size_t length,
                                  mla_token* id) {
    return guarded([&] {
        const auto found = tokenizers().find(tokenizer);
        need_array(content, length, "content");
        mla_token& out = need(id, "id");
        const auto token = found->token_id({content, length});
        if (!token) {
            throw Error(MLA_NOT_FOUND, "the tokenizer has no such token")
                .found(std::string_view(content, std::min<size_t>(length, 100)));
        }
        out = static_cast<mla_token>(*token);
    });
}

mla_status mla_tokenizer_encode(mla_tokenizer* tokenizer, const char* text, size_t length,
                                int add_special_tokens, mla_token* ids, size_t capacity,
                                size_t* count) {
    return guarded([&] {
        const auto found = tokenizers().find(tokenizer);
        need_array(text, length, "text");
        need_array(ids, capacity, "ids");
        size_t& size = need(count, "count");
        const auto encoded = found->encode({text, length}, add_special_tokens != 0);
        copy_out(encoded.data(), encoded.size(), ids, capacity, size);
    });
}

mla_status mla_tokenizer_decode(mla_tokenizer* tokenizer, const mla_token* ids, size_t count,
                                int skip_special_tokens, char* text, size_t capacity,
                                size_t* length) {
    return guarded([&] {
        const auto found = tokenizers().find(tokenizer);
        need_array(ids, count, "ids");
        need_array(text, capacity, "text");
        size_t& size = need(length, "length");
        std::string decoded;
        const auto chain = found->decoder().chain(decoded);
        for (size_t i = 0; i < count; ++i) {
            found->decode(static_cast<uint32_t>(ids[i]), skip_special_tokens != 0, *chain);
        }
        chain->finish();
        copy_out(decoded.data(), decoded.size(), text, capacity, size);
    });
}

mla_status mla_text_stream_create(mla_tokenizer* tokenizer, int skip_special_tokens,
                                  mla_text_stream** stream) {
    return guarded([&] {
        auto found = tokenizers().find(tokenizer);
        mla_text_stream*& out = need(stream, "stream");
        out = streams().add(
            std::make_shared<LockedStream>(std::move(found), skip_special_tokens != 0));
    });
}

mla_status mla_text_stream_push(mla_text_stream* stream, mla_token id, const char** text,
                                size_t* length) {
    return guarded([&] {
        give_piece(stream, text, length, [&](Stream& own) -> const std::string& {
            return own.push(static_cast<uint32_t>(id));
        });
    });
}

mla_status mla_text_stream_flush(mla_text_stream* stream, const char** text, size_t* length) {
    return guarded([&] {
        give_piece(stream, text, length,
                   [](Stream& own) -> const std::string& { return own.flush(); });
    });
}

mla_status mla_text_stream_destroy(mla_text_stream* stream) {
    return guarded([&] { streams().remove(stream); });
}
