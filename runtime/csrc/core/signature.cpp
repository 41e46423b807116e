#include "core/signature.h"

#include <map>
#include <vector>

namespace mla::core {

namespace {

constexpr int64_t kAny = -1;  // also what onnxruntime gives for a dimension with a name

struct TensorType {
    ONNXTensorElementDataType type;
    std::vector<int64_t> shape;
};

using Signature = std::map<std::string, TensorType>;

std::string text(const TensorType& tensor) {
    std::string shape;
    for (const int64_t extent : tensor.shape) {
        shape += (shape.empty() ? "" : ", ") + (extent < 0 ? "?" : std::to_string(extent));
    }
    return join("type ", static_cast<int>(tensor.type), " of onnxruntime's enum, [", shape, "]");
}

Signature wanted(const Bundle& bundle, bool inputs) {
    Signature signature;
    if (inputs) {
        for (const char* name : {"input_ids", "block_table", "logit_index"}) {
            signature[name] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {kAny, kAny}};
        }
        for (const char* name : {"past_lengths", "new_lengths"}) {
            signature[name] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {kAny}};
        }
    } else {
        signature["logits"] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                               {kAny, kAny, int64_t{bundle.manifest.model.vocab_size}}};
    }
    const auto& layers = bundle.manifest.cache;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
        for (const CachePart& part : layers[layer].parts) {
            TensorType tensor{onnx_type(part.type), {kAny}};
            tensor.shape.insert(tensor.shape.end(), part.page_shape.begin(), part.page_shape.end());
            signature[inputs ? cache_input(layer, part) : cache_output(layer, part)] = tensor;
        }
    }
    return signature;
}

Signature found(const OrtApi& api, const OrtSession& session, bool inputs) {
    const auto must = [&](OrtStatus* status) {
        check(api, status, MLA_BAD_BUNDLE, "onnxruntime cannot describe the graph");
    };
    OrtAllocator* allocator = nullptr;
    must(api.GetAllocatorWithDefaultOptions(&allocator));
    size_t count = 0;
    must(inputs ? api.SessionGetInputCount(&session, &count)
                : api.SessionGetOutputCount(&session, &count));
    Signature signature;
    for (size_t i = 0; i < count; ++i) {
        char* raw = nullptr;
        must(inputs ? api.SessionGetInputName(&session, i, allocator, &raw)
                    : api.SessionGetOutputName(&session, i, allocator, &raw));
        const std::string name = raw;
        must(api.AllocatorFree(allocator, raw));
        OrtTypeInfo* info = nullptr;
        must(inputs ? api.SessionGetInputTypeInfo(&session, i, &info)
                    : api.SessionGetOutputTypeInfo(&session, i, &info));
        const OrtOwned<OrtTypeInfo> owned(info, api.ReleaseTypeInfo);
        const OrtTensorTypeAndShapeInfo* tensor = nullptr;
        must(api.CastTypeInfoToTensorInfo(info, &tensor));
        TensorType& type = signature[name];
        type.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        if (tensor == nullptr) continue;  // a sequence or a map
        must(api.GetTensorElementType(tensor, &type.type));
        size_t rank = 0;
        must(api.GetDimensionsCount(tensor, &rank));
        type.shape.resize(rank);
        must(api.GetDimensions(tensor, type.shape.data(), rank));
    }
    return signature;
}

bool agree(const TensorType& found, const TensorType& wanted) {
    if (found.type != wanted.type) return false;
    if (found.shape.empty()) return true;  // the file has no shape
    if (found.shape.size() != wanted.shape.size()) return false;
    for (size_t axis = 0; axis < found.shape.size(); ++axis) {
        const int64_t a = found.shape[axis], b = wanted.shape[axis];
        if (a >= 0 && b >= 0 && a != b) return false;
    }
    return true;
}

void compare(const Bundle& bundle, const char* kind, const Signature& found,
             const Signature& wanted) {
    const auto bad = [&](const char* problem, const std::string& name) {
        return Error(MLA_BAD_BUNDLE, join(bundle.graph_path(), problem, kind, " ", name));
    };
    for (const auto& [name, tensor] : wanted) {
        const auto node = found.find(name);
        if (node == found.end()) throw bad(" lacks the ", name).next("export the model again");
        if (agree(node->second, tensor)) continue;
        throw bad(" does not have the manifest's ", name)
            .found(text(node->second))
            .allowed(text(tensor))
            .next("export the model again");
    }
    for (const auto& [name, tensor] : found) {
        if (wanted.count(name) == 0) {
            throw bad(" has an unknown ", name).next("export the model again");
        }
    }
}

}  // namespace

std::string cache_input(size_t layer, const CachePart& part) {
    return join("cache.", layer, ".", part.name);
}

std::string cache_output(size_t layer, const CachePart& part) {
    return join("present.", layer, ".", part.name);
}

ONNXTensorElementDataType onnx_type(ElementType type) {
    switch (type) {
        case ElementType::kUint8:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        case ElementType::kInt8:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
        case ElementType::kFloat16:
            return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        case ElementType::kFloat32:
            break;
    }
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

void check_signature(const OrtApi& api, const OrtSession& session, const Bundle& bundle) {
    compare(bundle, "input", found(api, session, true), wanted(bundle, true));
    compare(bundle, "output", found(api, session, false), wanted(bundle, false));
}

}  // namespace mla::core
