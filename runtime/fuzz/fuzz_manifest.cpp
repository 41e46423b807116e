// manifest.json: what is accepted keeps to the limits that the engine relies on.
#include <string>

#include "core/manifest.h"
#include "fuzz/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using namespace mla::core;
    using mla::fuzz::check;
    const std::string text(reinterpret_cast<const char*>(data), size);
    mla::fuzz::succeeds([&] {
        const Manifest manifest = parse_manifest(text, "manifest.json");
        check(manifest.cache.size() == manifest.model.num_hidden_layers, "layers");
        check(manifest.model.vocab_size > 0 && manifest.model.max_position_embeddings > 0, "sizes");
        for (const LayerCache& layer : manifest.cache) {
            check(!layer.parts.empty(), "a layer without parts");
            for (const CachePart& part : layer.parts) {
                const size_t bytes = part.page_bytes();
                check(bytes > 0 && bytes % kPageTokens == 0 && bytes <= 64u << 20, "page bytes");
            }
        }
        for (const FileEntry& file : manifest.files) {
            const std::string path = "/" + file.path + "/";
            check(file.path[0] != '/' && path.find("/../") == std::string::npos, "a path outside");
            check(file.sha256.size() == 64, "a digest");
        }
    });
    return 0;
}
