// Session files, loaded into the engine of a real bundle:
//
//     MLA_FUZZ_BUNDLE=FOLDER MLA_FUZZ_ONNXRUNTIME=LIBRARY fuzz_session ...
//
// The seeds are of the small bundle that the tests make; another bundle needs seeds of its own.
// Each input is loaded as it is, and again with the fields set right that a fuzzer cannot guess:
// the fingerprint of the model, and the digest at the end.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "core/engine.h"
#include "core/session_file.h"
#include "fuzz/check.h"

namespace {

using namespace mla::core;
using mla::fuzz::check;

const char* setting(const char* name) {
    const char* value = std::getenv(name);
    check(value != nullptr, name);
    return value;
}

// Never destroyed: onnxruntime's threads must not end in a destructor of a global.
Engine& engine() {
    static auto& made = *new std::shared_ptr<Engine>([] {
        EngineOptions options;
        options.bundle = setting("MLA_FUZZ_BUNDLE");
        options.graph.onnxruntime_library = setting("MLA_FUZZ_ONNXRUNTIME");
        options.graph.threads = 1;
        options.graph.spin = false;
        options.max_tokens = 640;
        return std::make_shared<Engine>(options);
    }());
    return *made;
}

// A file in memory.
struct MemoryFile {
    explicit MemoryFile(const std::string& bytes) : descriptor(memfd_create("session", 0)) {
        check(descriptor >= 0, "memfd_create");
        check(write(descriptor, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()),
              "write");
    }
    ~MemoryFile() { close(descriptor); }
    std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor); }
    const int descriptor;
};

void load(const std::string& bytes) {
    const MemoryFile file(bytes);
    const uint64_t free_before = engine().free_tokens();
    const bool loaded = mla::fuzz::succeeds([&] {
        const auto session = load_session(engine(), file.path());
        const auto tokens = engine().tokens(*session);
        check(bytes.size() > tokens.size() * sizeof(mla_token), "more tokens than the file has");
        static const std::string copy = "/tmp/mla-fuzz-session-" + std::to_string(getpid());
        save_session(*session, copy);
        std::ifstream saved(copy, std::ios::binary);
        const std::string again{std::istreambuf_iterator<char>(saved), {}};
        unlink(copy.c_str());
        check(again == bytes, "a session saved again differs");
        const mla_token next = 1;
        if (engine().info(*session).room > 0) {
            engine().step({Request{session.get(), &next, 1, {}, nullptr}}, nullptr);
        }
    });
    check(engine().free_tokens() == free_before, "pages were lost");
    (void)loaded;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    std::string bytes(reinterpret_cast<const char*>(data), size);
    load(bytes);
    constexpr size_t kFingerprint = 16, kHeader = 64, kDigest = sizeof(Sha256::Digest);
    if (size < kHeader + kDigest) return 0;
    const Sha256::Digest fingerprint = engine().bundle().fingerprint();
    std::memcpy(&bytes[kFingerprint], fingerprint.data(), fingerprint.size());
    Sha256 hash;
    hash.update(bytes.data(), size - kDigest);
    const Sha256::Digest digest = hash.finish();
    std::memcpy(&bytes[size - kDigest], digest.data(), digest.size());
    load(bytes);
    return 0;
}
