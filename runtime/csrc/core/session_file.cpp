#include "core/session_file.h"

#include <algorithm>
#include <cstring>

#include "core/engine.h"
#include "core/error.h"
#include "core/file.h"

namespace mla::core {

namespace {

constexpr char kMagic[8] = {'m', 'l', 'a', '-', 's', 'e', 's', 's'};
constexpr uint32_t kVersion = 1;
constexpr size_t kHeaderBytes = 64;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "session files are little-endian");

struct Header {
    char magic[8];
    uint32_t version;
    uint32_t page_tokens;
    Sha256::Digest fingerprint;
    uint64_t page_bytes;
    uint64_t tokens;
};
static_assert(sizeof(Header) == kHeaderBytes, "the header has no gaps");

Error bad(const std::string& path, const char* what) {
    return Error(MLA_BAD_SESSION_FILE, path + what);
}

Error damaged(const std::string& path) {
    return bad(path, " is damaged").next("copy it again, or compute the session anew");
}

// Bytes of the file. False: more than a file can have.
bool file_bytes(const Header& header, uint64_t& bytes) {
    const uint64_t pages = header.tokens / kPageTokens + (header.tokens % kPageTokens != 0);
    uint64_t token_bytes = 0, cache_bytes = 0;
    return !__builtin_mul_overflow(header.tokens, sizeof(mla_token), &token_bytes) &&
           !__builtin_mul_overflow(pages, header.page_bytes, &cache_bytes) &&
           !__builtin_add_overflow(token_bytes, cache_bytes, &bytes) &&
           !__builtin_add_overflow(bytes, kHeaderBytes + sizeof(Sha256::Digest), &bytes);
}

void check_header(const Header& header, uint64_t size, Engine& engine, const std::string& path) {
    if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) {
        throw bad(path, " is not a session file").next("name a file that a session was saved to");
    }
    if (header.version != kVersion) {
        throw bad(path, " is of another version of the session file")
            .found(header.version)
            .allowed(kVersion)
            .next("compute the session anew, or use the mla-deploy that wrote it");
    }
    if (header.fingerprint != engine.bundle().fingerprint()) {
        throw bad(path, " is a session of another model")
            .next("load it into the bundle that it was saved from");
    }
    uint64_t expected = 0;
    if (header.page_tokens != kPageTokens || header.page_bytes != engine.arena().page_bytes() ||
        !file_bytes(header, expected) || expected != size) {
        throw damaged(path);
    }
}

}  // namespace

void save_session(Session& session, const std::string& path) {
    const Claim claim(session);
    Engine& engine = session.engine();
    const Engine::Contents contents = engine.contents(session);
    Header header{};
    std::copy(std::begin(kMagic), std::end(kMagic), header.magic);
    header.version = kVersion;
    header.page_tokens = kPageTokens;
    header.fingerprint = engine.bundle().fingerprint();
    header.page_bytes = engine.arena().page_bytes();
    header.tokens = contents.tokens.size();

    OutputFile file(path);
    Sha256 hash;
    const auto write = [&](const void* data, size_t size) {
        hash.update(data, size);
        file.write(data, size);
    };
    write(&header, sizeof(header));
    write(contents.tokens.data(), contents.tokens.size() * sizeof(mla_token));
    std::vector<uint8_t> buffer(engine.arena().page_bytes());
    for (const int64_t page : contents.pages) {
        engine.arena().read(page, buffer.data());
        write(buffer.data(), buffer.size());
    }
    const Sha256::Digest digest = hash.finish();
    file.write(digest.data(), digest.size());
    file.commit();
}

std::shared_ptr<Session> load_session(Engine& engine, const std::string& path) {
    InputFile file(path);
    Header header;
    if (file.size() < sizeof(header)) throw bad(path, " is too short for a session file");
    Sha256 hash;
    const auto read = [&](void* data, size_t size) {
        file.read(data, size);
        hash.update(data, size);
    };
    read(&header, sizeof(header));
    check_header(header, file.size(), engine, path);

    std::vector<mla_token> tokens(static_cast<size_t>(header.tokens));
    read(tokens.data(), tokens.size() * sizeof(mla_token));
    // The file's size bounds what is taken; until it is known to be sound, no one sees the session.
    const auto session = engine.reserved(std::move(tokens));
    const Engine::Contents contents = engine.contents(*session);
    std::vector<uint8_t> buffer(engine.arena().page_bytes());
    for (const int64_t page : contents.pages) {
        read(buffer.data(), buffer.size());
        engine.arena().write(page, buffer.data());
    }
    Sha256::Digest digest;
    file.read(digest.data(), digest.size());
    if (hash.finish() != digest) throw damaged(path);
    try {
        if (header.tokens > 0) engine.check_tokens(contents.tokens.data(), contents.tokens.size());
    } catch (const Error&) {
        throw damaged(path);
    }
    return session;
}

}  // namespace mla::core
