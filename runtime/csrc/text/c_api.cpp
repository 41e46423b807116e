// The functions of text.h: checks, and the border that no exception crosses.
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>

#include "text/error.h"
#include "text/handles.h"
#include "text/stream.h"
#include "text/utf8.h"

namespace mla::text {

uintptr_t next_handle() {
    static std::atomic<uintptr_t> last{0};
    return last += 16;
}

namespace {

thread_local std::string last_error;

// It may cite a file or an argument that is not UTF-8.
void set_last_error(const std::string& text) {
    last_error.clear();
    LossyUtf8 utf8;
    utf8.push(text, last_error);
    utf8.flush(last_error);
}

// Runs `body`, and turns what it throws into a status.
template <class Body>
mla_text_status guarded(Body body) noexcept {
    mla_text_status status = MLA_TEXT_INTERNAL;
    try {
        try {
            body();
            return MLA_TEXT_OK;
        } catch (const Error& error) {
            status = error.status();
            set_last_error(error.what());
        } catch (const std::bad_alloc&) {
            status = MLA_TEXT_OUT_OF_MEMORY;
            last_error = "out of memory";
        } catch (const std::exception& error) {
            set_last_error(join("a mistake of mla-deploy, please report it: ", error.what()));
        }
    } catch (...) {  // no memory even for the text
        last_error.clear();
        status = MLA_TEXT_OUT_OF_MEMORY;
    }
    return status;
}

struct LockedStream {
    LockedStream(std::shared_ptr<const Tokenizer> tokenizer, bool skip)
        : stream(std::move(tokenizer), skip) {}
    std::mutex mutex;
    Stream stream;
};

auto& tokenizers() {
    static HandleTable<mla_tokenizer, const Tokenizer> table("tokenizer");
    return table;
}
auto& streams() {
    static HandleTable<mla_text_stream, LockedStream> table("text stream");
    return table;
}

void require(const void* pointer, const char* name) {
    if (!pointer) {
        throw Error(MLA_TEXT_INVALID_ARGUMENT, join("the argument ", name, " is null"))
            .next("pass a pointer");
    }
}

// A null pointer is right where there is nothing to read or write.
void require(const void* pointer, size_t size, const char* name) {
    if (size > 0) require(pointer, name);
}

// The results, or how many there are.
template <class Out, class In>
void copy_out(const In* from, size_t size, Out* to, size_t capacity, size_t* count) {
    *count = size;
    if (size > capacity) {
        throw Error(MLA_TEXT_BUFFER_TOO_SMALL, "the buffer is too small")
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
        const size_t size = std::fread(part, 1, sizeof part, file.get());
        bytes.append(part, size);
        if (size < sizeof part) break;
    }
    if (!file || std::ferror(file.get())) {
        throw Error(MLA_TEXT_FILE_ERROR, join("cannot read ", path))
            .found(std::strerror(errno))
            .next("check that it is a file, and that it may be read");
    }
    return bytes;
}

void give(const std::string& piece, const char** text, size_t* length) {
    *text = piece.c_str();
    *length = piece.size();
}

}  // namespace
}  // namespace mla::text

using namespace mla::text;

const char* mla_text_last_error(void) { return last_error.c_str(); }

mla_text_status mla_tokenizer_open(const char* path, mla_tokenizer** tokenizer) {
    return guarded([&] {
        require(path, "path");
        require(tokenizer, "tokenizer");
        *tokenizer = tokenizers().open(Tokenizer::parse(read_file(path)));
    });
}

mla_text_status mla_tokenizer_open_bytes(const char* json, size_t size, mla_tokenizer** tokenizer) {
    return guarded([&] {
        require(json, size, "json");
        require(tokenizer, "tokenizer");
        *tokenizer = tokenizers().open(Tokenizer::parse({json, size}));
    });
}

mla_text_status mla_tokenizer_close(mla_tokenizer* tokenizer) {
    return guarded([&] { tokenizers().close(tokenizer); });
}

mla_text_status mla_tokenizer_vocab_size(mla_tokenizer* tokenizer, uint32_t* size) {
    return guarded([&] {
        const auto own = tokenizers().get(tokenizer);
        require(size, "size");
        *size = own->vocab_size();
    });
}

mla_text_status mla_tokenizer_token_id(mla_tokenizer* tokenizer, const char* content, size_t length,
                                       mla_token* id) {
    return guarded([&] {
        const auto own = tokenizers().get(tokenizer);
        require(content, length, "content");
        require(id, "id");
        const auto found = own->token_id({content, length});
        if (!found) {
            throw Error(MLA_TEXT_NOT_FOUND, "the tokenizer has no such token")
                .found(std::string_view(content, std::min<size_t>(length, 100)));
        }
        *id = static_cast<mla_token>(*found);
    });
}

mla_text_status mla_tokenizer_encode(mla_tokenizer* tokenizer, const char* text, size_t length,
                                     int add_special_tokens, mla_token* ids, size_t capacity,
                                     size_t* count) {
    return guarded([&] {
        const auto own = tokenizers().get(tokenizer);
        require(text, length, "text");
        require(ids, capacity, "ids");
        require(count, "count");
        const auto found = own->encode({text, length}, add_special_tokens != 0);
        copy_out(found.data(), found.size(), ids, capacity, count);
    });
}

mla_text_status mla_tokenizer_decode(mla_tokenizer* tokenizer, const mla_token* ids, size_t count,
                                     int skip_special_tokens, char* text, size_t capacity,
                                     size_t* length) {
    return guarded([&] {
        const auto own = tokenizers().get(tokenizer);
        require(ids, count, "ids");
        require(text, capacity, "text");
        require(length, "length");
        std::string decoded;
        const TokenSink chain = own->decoder().chain(decoded);
        for (size_t i = 0; i < count; ++i) {
            own->decode(static_cast<uint32_t>(ids[i]), skip_special_tokens != 0, *chain);
        }
        chain->finish();
        copy_out(decoded.data(), decoded.size(), text, capacity, length);
    });
}

mla_text_status mla_text_stream_create(mla_tokenizer* tokenizer, int skip_special_tokens,
                                       mla_text_stream** stream) {
    return guarded([&] {
        auto own = tokenizers().get(tokenizer);
        require(stream, "stream");
        *stream = streams().open(
            std::make_shared<LockedStream>(std::move(own), skip_special_tokens != 0));
    });
}

mla_text_status mla_text_stream_push(mla_text_stream* stream, mla_token id, const char** text,
                                     size_t* length) {
    return guarded([&] {
        const auto own = streams().get(stream);
        require(text, "text");
        require(length, "length");
        std::lock_guard<std::mutex> lock(own->mutex);
        give(own->stream.push(static_cast<uint32_t>(id)), text, length);
    });
}

mla_text_status mla_text_stream_flush(mla_text_stream* stream, const char** text, size_t* length) {
    return guarded([&] {
        const auto own = streams().get(stream);
        require(text, "text");
        require(length, "length");
        std::lock_guard<std::mutex> lock(own->mutex);
        give(own->stream.flush(), text, length);
    });
}

mla_text_status mla_text_stream_destroy(mla_text_stream* stream) {
    return guarded([&] { streams().close(stream); });
}
