#include "core/manifest.h"

#include <algorithm>
#include <set>

#include "core/error.h"
#include "core/json_reader.h"

namespace mla::core {

namespace {

constexpr uint64_t kFormatVersion = 1;
constexpr int64_t kMaxExtent = 1 << 20;
constexpr size_t kMaxPageBytes = 64 << 20;  // of one part: 1 MiB a token
constexpr uint32_t kMaxInteger = 0x7fffffff;

// Whether the path stays inside the folder it is relative to.
bool is_inside(const std::string& path) {
    if (path.empty() || path.front() == '/') return false;
    bool has_name = false;
    for (size_t start = 0; start <= path.size();) {
        const size_t end = std::min(path.find('/', start), path.size());
        const std::string part = path.substr(start, end - start);
        if (part == "..") return false;
        has_name = has_name || (!part.empty() && part != ".");
        start = end + 1;
    }
    return has_name && std::none_of(path.begin(), path.end(), [](unsigned char c) {
               return c == '\\' || c < 0x20 || c == 0x7f;
           });
}

bool is_hex_digest(const std::string& text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

FileEntry read_file_entry(const Json& value, const std::string& where) {
    JsonObject object(value, where);
    FileEntry entry;
    entry.path = object.text("path");
    if (!is_inside(entry.path)) throw object.bad("path", "a path inside the bundle");
    entry.bytes = object.integer<uint64_t>("bytes", 0, uint64_t{1} << 62);
    entry.sha256 = object.text("sha256");
    if (!is_hex_digest(entry.sha256)) throw object.bad("sha256", "64 lower-case hex digits");
    object.end();
    return entry;
}

ElementType read_type(JsonObject& object) {
    const std::string name = object.text("dtype");
    for (const auto type :
         {ElementType::kUint8, ElementType::kInt8, ElementType::kFloat16, ElementType::kFloat32}) {
        if (name == name_of(type)) return type;
    }
    throw object.bad("dtype", "uint8, int8, float16 or float32");
}

CachePart read_part(const Json& value, const std::string& where) {
    JsonObject object(value, where);
    CachePart part;
    part.name = object.text("name");
    if (part.name.empty() ||
        part.name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") != std::string::npos) {
        throw object.bad("name", "a-z, 0-9 and _");
    }
    part.type = read_type(object);
    size_t bytes = bytes_of(part.type);
    for (const Json& extent : object.array("page_shape", 1)) {
        if (part.page_shape.size() == 4) throw object.bad("page_shape", "at most 4 axes");
        part.page_shape.push_back(object.as_integer<int64_t>(extent, "page_shape", 1, kMaxExtent));
        bytes *= static_cast<size_t>(part.page_shape.back());
        if (bytes > kMaxPageBytes) {
            throw object.bad("page_shape", join("a page of at most ", kMaxPageBytes, " bytes"));
        }
    }
    if (bytes % kPageTokens != 0) {
        throw object.bad("page_shape", join("a page of ", kPageTokens, " tokens of whole bytes"));
    }
    object.end();
    return part;
}

LayerCache read_layer(const Json& value, const std::string& where) {
    JsonObject object(value, where);
    LayerCache layer;
    layer.format = object.text("format");
    std::set<std::string> names;
    for (const Json& part : object.array("parts", 1)) {
        layer.parts.push_back(read_part(part, join(where, ".parts.", layer.parts.size())));
        if (!names.insert(layer.parts.back().name).second) {
            throw object.bad("parts", "parts of different names");
        }
    }
    object.end();
    return layer;
}

ModelInfo read_model(const Json& value) {
    JsonObject object(value, "model");
    const auto positive = [&](const char* name) {
        return object.integer<uint32_t>(name, 1, kMaxInteger);
    };
    ModelInfo model;
    model.model_type = object.text("model_type");
    model.parameters = object.integer<uint64_t>("parameters", 0);
    model.vocab_size = object.integer<uint32_t>("vocab_size", 1, 1 << 24);
    model.hidden_size = positive("hidden_size");
    model.num_hidden_layers = positive("num_hidden_layers");
    model.num_attention_heads = positive("num_attention_heads");
    model.q_lora_rank = object.any("q_lora_rank").is_null() ? 0 : positive("q_lora_rank");
    model.kv_lora_rank = positive("kv_lora_rank");
    model.qk_nope_head_dim = positive("qk_nope_head_dim");
    model.qk_rope_head_dim = positive("qk_rope_head_dim");
    model.v_head_dim = positive("v_head_dim");
    model.max_position_embeddings = positive("max_position_embeddings");
    if (!object.any("bos_token_id").is_null()) {
        model.bos_token_id = object.integer<int32_t>("bos_token_id", 0);
    }
    for (const Json& id : object.array("eos_token_ids")) {
        model.eos_token_ids.push_back(object.as_integer<int32_t>(id, "eos_token_ids", 0));
    }
    object.end();
    return model;
}

void read_graph(const Json& value, Manifest& manifest) {
    JsonObject object(value, "graph");
    manifest.graph_path = object.text("path");
    if (object.text("backend") != "onnx") throw object.bad("backend", "onnx");
    manifest.lowering = object.text("lowering");
    object.integer<int64_t>("opset", 1);
    object.end();
}

// The types of its activations are those of the graph, so that nobody has to know them.
void read_cuda(const Json& value) {
    JsonObject object(value, "cuda");
    if (object.text("dtype") != "float16") throw object.bad("dtype", "float16");
    object.end();
}

std::vector<LayerCache> read_cache(const Json& value) {
    JsonObject object(value, "cache");
    object.integer<int64_t>("page_tokens", kPageTokens, kPageTokens);
    std::vector<LayerCache> layers;
    for (const Json& layer : object.array("layers", 1)) {
        layers.push_back(read_layer(layer, join("cache.layers.", layers.size())));
    }
    object.end();
    return layers;
}

void check_version(const Json& value, const std::string& path) {
    const auto format = value.is_object() ? value.find("format") : value.end();
    if (!value.is_object() || format == value.end() || *format != "mla-deploy-bundle") {
        throw Error(MLA_BAD_BUNDLE, path + " is not the manifest of a bundle")
            .next("export the model again");
    }
    const auto version = value.find("version");
    if (version != value.end() && *version == kFormatVersion) return;
    throw Error(MLA_BAD_BUNDLE, path + " is of another version of the bundle format")
        .found(version == value.end() ? "none" : version->dump().substr(0, 40))
        .allowed(kFormatVersion)
        .next("export again with this mla-deploy, or use the one that wrote it");
}

}  // namespace

const char* name_of(Device device) { return device == Device::kCpu ? "cpu" : "cuda"; }

Device device_of(const std::string& name) {
    for (const Device device : {Device::kCpu, Device::kCuda}) {
        if (name == name_of(device)) return device;
    }
    throw invalid("there is no such device").found(name).allowed("cpu, cuda");
}

const char* name_of(ElementType type) {
    switch (type) {
        case ElementType::kUint8:
            return "uint8";
        case ElementType::kInt8:
            return "int8";
        case ElementType::kFloat16:
            return "float16";
        case ElementType::kFloat32:
            break;
    }
    return "float32";
}

size_t bytes_of(ElementType type) {
    switch (type) {
        case ElementType::kUint8:
        case ElementType::kInt8:
            return 1;
        case ElementType::kFloat16:
            return 2;
        case ElementType::kFloat32:
            break;
    }
    return 4;
}

size_t CachePart::page_bytes() const {
    size_t bytes = bytes_of(type);
    for (const int64_t extent : page_shape) bytes *= static_cast<size_t>(extent);
    return bytes;
}

Manifest parse_manifest(const std::string& text, const std::string& path) {
    try {
        const Json value = Json::parse(text);
        check_version(value, path);
        JsonObject object(value, "");
        object.any("format");
        object.any("version");
        Manifest manifest;
        manifest.producer = object.text("producer");
        manifest.model = read_model(object.any("model"));
        read_graph(object.any("graph"), manifest);
        if (object.has("cuda")) {
            read_cuda(object.any("cuda"));
            manifest.device = Device::kCuda;
        }
        manifest.cache = read_cache(object.any("cache"));
        if (manifest.cache.size() != manifest.model.num_hidden_layers) {
            throw object.bad("cache.layers",
                             join(manifest.model.num_hidden_layers, " layers, as the model has"));
        }
        if (!object.any("recipe").is_object()) throw object.bad("recipe", "an object");
        for (const Json& file : object.array("files")) {
            manifest.files.push_back(read_file_entry(file, join("files.", manifest.files.size())));
        }
        object.end();
        return manifest;
    } catch (const Json::exception& error) {  // not JSON, not UTF-8, a number out of range
        throw Error(MLA_BAD_BUNDLE, path + " cannot be read")
            .found(error.what())
            .next("export the model again");
    }
}

}  // namespace mla::core
