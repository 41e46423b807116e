// `manifest.json` of a bundle: what mla_deploy/bundle.py writes, read as untrusted input.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace mla::core {

constexpr int64_t kPageTokens = 64;

struct FileEntry {
    std::string path;  // relative to the bundle, and inside it
    uint64_t bytes;
    std::string sha256;  // 64 hex digits
};

// What a graph was exported for, and what an engine computes on.
enum class Device { kCpu, kCuda };

const char* name_of(Device device);

// Errors: MLA_INVALID_ARGUMENT: no such name.
Device device_of(const std::string& name);

enum class ElementType { kUint8, kInt8, kFloat16, kFloat32 };

const char* name_of(ElementType type);
size_t bytes_of(ElementType type);

// One typed array of a layer's cache: [pages, *page_shape].
struct CachePart {
    std::string name;
    ElementType type;
    std::vector<int64_t> page_shape;

    size_t page_bytes() const;
};

struct LayerCache {
    std::string format;
    std::vector<CachePart> parts;
};

struct ModelInfo {
    std::string model_type;
    uint64_t parameters;
    uint32_t vocab_size;
    uint32_t hidden_size;
    uint32_t num_hidden_layers;
    uint32_t num_attention_heads;
    uint32_t q_lora_rank;  // 0: none
    uint32_t kv_lora_rank;
    uint32_t qk_nope_head_dim;
    uint32_t qk_rope_head_dim;
    uint32_t v_head_dim;
    uint32_t max_position_embeddings;
    std::optional<int32_t> bos_token_id;
    std::vector<int32_t> eos_token_ids;
};

struct Manifest {
    std::string producer;
    ModelInfo model;
    std::string graph_path;
    std::string lowering;  // of the graph: ort1.31 is for onnxruntime 1.31 and later
    Device device = Device::kCpu;
    std::vector<LayerCache> cache;  // one a layer
    std::vector<FileEntry> files;
};

// Parses the text of the manifest at `path`. Errors: MLA_BAD_BUNDLE.
Manifest parse_manifest(const std::string& text, const std::string& path);

}  // namespace mla::core
