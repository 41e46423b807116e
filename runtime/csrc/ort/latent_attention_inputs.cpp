#include "ort/latent_attention_inputs.h"

#include <initializer_list>

namespace mla::ort {

namespace {

constexpr int64_t kPageTokens = cpu::kPageTokens;
constexpr int64_t kBlockTokens = 16;
constexpr int64_t kLargestDim = 1 << 20;  // fits an int; the kernels' own limits are lower

constexpr ONNXTensorElementDataType kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr ONNXTensorElementDataType kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr ONNXTensorElementDataType kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
constexpr ONNXTensorElementDataType kInt8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
constexpr ONNXTensorElementDataType kUint8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;

constexpr const char* kNames[] = {"q",    "kv",          "cos",          "sin",        "w_uk",
                                  "w_uv", "block_table", "past_lengths", "new_lengths"};

int dim(const OrtApi& api, const OrtKernelInfo* info, const char* name) {
    const int64_t value = integer_attribute(api, info, name);
    if (value < 1 || value > kLargestDim) {
        throw invalid(std::string("attribute ") + name + " is " + std::to_string(value) +
                      ", allowed are 1 to " + std::to_string(kLargestDim));
    }
    return static_cast<int>(value);
}

template <class Value>
struct Choice {
    const char* name;
    Value value;
};

constexpr Choice<cpu::CacheFormat> kFormats[] = {{"int4", cpu::CacheFormat::kInt4},
                                                 {"int8", cpu::CacheFormat::kInt8},
                                                 {"fp16", cpu::CacheFormat::kFp16},
                                                 {"fp32", cpu::CacheFormat::kFp32}};
constexpr Choice<cpu::AttentionMode> kModes[] = {{"auto", cpu::AttentionMode::kAuto},
                                                 {"absorbed", cpu::AttentionMode::kAbsorbed},
                                                 {"expanded", cpu::AttentionMode::kExpanded}};

template <class Value, size_t count>
Value chosen(const OrtApi& api, const OrtKernelInfo* info, const char* name,
             const Choice<Value> (&choices)[count]) {
    const std::string found = string_attribute(api, info, name);
    std::string names;
    for (const Choice<Value>& choice : choices) {
        if (found == choice.name) return choice.value;
        names += (names.empty() ? "" : ", ") + std::string(choice.name);
    }
    throw invalid(std::string("attribute ") + name + " is '" + found + "', allowed are " + names +
                  ": export the model with one of these, or run it without the operator library");
}

const char* type_name(ONNXTensorElementDataType type) {
    switch (type) {
        case kFloat:
            return "float32";
        case kHalf:
            return "float16";
        case kInt64:
            return "int64";
        case kInt8:
            return "int8";
        case kUint8:
            return "uint8";
        default:
            return "another type";
    }
}

ONNXTensorElementDataType declared_type(const OrtApi& api, const OrtKernelInfo* info,
                                        size_t index) {
    OrtTypeInfo* type = nullptr;
    check(api, api.KernelInfo_GetInputTypeInfo(info, index, &type));
    const OrtTensorTypeAndShapeInfo* tensor = nullptr;
    ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    OrtStatus* status = api.CastTypeInfoToTensorInfo(type, &tensor);
    if (status == nullptr && tensor != nullptr) {
        status = api.GetTensorElementType(tensor, &element);
    }
    api.ReleaseTypeInfo(type);
    check(api, status);
    return element;
}

void require_type(const char* name, ONNXTensorElementDataType found,
                  std::initializer_list<ONNXTensorElementDataType> allowed) {
    std::string names;
    for (const ONNXTensorElementDataType type : allowed) {
        if (found == type) return;
        names += (names.empty() ? "" : " or ") + std::string(type_name(type));
    }
    throw invalid(std::string("input ") + name + " is of " + type_name(found) + ", allowed is " +
                  names + ": export the model again");
}

void require_shape(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape) {
    bool same = tensor.rank == shape.size();
    for (size_t axis = 0; same && axis < shape.size(); ++axis) {
        same = tensor.shape[axis] == shape[axis];
    }
    if (same) return;
    Tensor wanted;
    wanted.rank = shape.size();
    for (size_t axis = 0; axis < shape.size(); ++axis) wanted.shape[axis] = shape[axis];
    throw invalid(std::string("input ") + name + " has shape " + text(tensor) + ", not " +
                  text(wanted));
}

}  // namespace

Attributes read_attributes(const OrtApi& api, const OrtKernelInfo* info) {
    Attributes a;
    a.cache_format = chosen(api, info, "cache_format", kFormats);
    a.mode = chosen(api, info, "mode", kModes);
    a.dims.heads = dim(api, info, "num_heads");
    a.dims.nope = dim(api, info, "qk_nope_head_dim");
    a.dims.rank = dim(api, info, "kv_lora_rank");
    a.dims.rope = dim(api, info, "qk_rope_head_dim");
    a.dims.v = dim(api, info, "v_head_dim");
    a.softmax_scale = float_attribute(api, info, "softmax_scale");
    a.latent_norm_epsilon = float_attribute(api, info, "latent_norm_epsilon");
    return a;
}

std::vector<Part> cache_parts(const Attributes& a) {
    cpu::PartInfo infos[cpu::kMaxParts];
    int count = 0;
    if (cpu::cache_parts(a.cache_format, a.dims.rank, a.dims.rope, infos, &count) !=
        cpu::Status::kOk) {
        throw invalid(cpu::last_error());
    }
    const bool is_float =
        a.cache_format == cpu::CacheFormat::kFp16 || a.cache_format == cpu::CacheFormat::kFp32;
    std::vector<Part> parts;
    for (int i = 0; i < count; ++i) {
        const int64_t width = infos[i].width;
        const int bytes = infos[i].element_bytes;
        const bool is_packed = a.cache_format == cpu::CacheFormat::kInt4 && i == 0;
        Part part{infos[i].name, bytes == 4 ? kFloat : kHalf, bytes, {width, kPageTokens}};
        if (bytes == 1) {
            part.type = is_packed ? kUint8 : kInt8;
            part.page_shape = {kPageTokens / kBlockTokens, width / 4, kBlockTokens, 4};
        } else if (is_float) {
            part.page_shape = {kPageTokens, width};
        }
        parts.push_back(part);
    }
    return parts;
}

void check_types(const OrtApi& api, const OrtKernelInfo* info, const std::vector<Part>& parts,
                 Activations activations) {
    size_t inputs = 0, outputs = 0;
    check(api, api.KernelInfo_GetInputCount(info, &inputs));
    check(api, api.KernelInfo_GetOutputCount(info, &outputs));
    if (inputs != kCache + parts.size() || outputs != 1 + parts.size()) {
        throw invalid("the node has " + std::to_string(inputs) + " inputs and " +
                      std::to_string(outputs) + " outputs; with a cache of " +
                      std::to_string(parts.size()) + " parts there are " +
                      std::to_string(kCache + parts.size()) + " and " +
                      std::to_string(1 + parts.size()) + ": export the model again");
    }
    for (size_t i = 0; i < kCache; ++i) {
        const ONNXTensorElementDataType type = declared_type(api, info, i);
        const bool is_weight = i == kWUk || i == kWUv;
        if (activations == Activations::kFp16 && (is_weight || i == kQ || i == kKv)) {
            require_type(kNames[i], type, {kHalf});
        } else if (is_weight) {
            require_type(kNames[i], type, {kFloat, kHalf});
        } else {
            require_type(kNames[i], type, {i < kWUk ? kFloat : kInt64});
        }
    }
    for (size_t i = 0; i < parts.size(); ++i) {
        const ONNXTensorElementDataType type = declared_type(api, info, kCache + i);
        // Graphs for TensorRT, whose plugins take no uint8, declare packed codes as int8.
        if (parts[i].type == kUint8 && type == kInt8) continue;
        require_type(parts[i].name, type, {parts[i].type});
    }
}

Operands read_operands(const OrtApi& api, const OrtKernelContext* context, const Attributes& a,
                       const std::vector<Part>& parts) {
    Operands operands;
    for (size_t i = 0; i < kCache; ++i) operands.inputs[i] = input(api, context, i);
    for (size_t i = 0; i < parts.size(); ++i) operands.cache[i] = input(api, context, kCache + i);

    const Tensor &q = operands.inputs[kQ], &table = operands.inputs[kBlockTable];
    const int64_t batch = operands.batch = q.shape[0];  // 0 where q has no axes: found below
    const int64_t steps = operands.steps = q.shape[1];
    const int64_t heads = a.dims.heads, nope = a.dims.nope, rank = a.dims.rank;
    const int64_t rope = a.dims.rope, v = a.dims.v;
    operands.pages_per_sequence = table.shape[1];
    operands.pages = operands.cache[0].shape[0];
    const std::vector<int64_t> shapes[] = {
        {batch, steps, heads * (nope + rope)},
        {batch, steps, rank + rope},
        {batch, steps, rope / 2},
        {batch, steps, rope / 2},
        {heads, nope, rank},
        {heads, rank, v},
        {batch, operands.pages_per_sequence},
        {batch},
        {batch},
    };
    for (size_t i = 0; i < kCache; ++i) require_shape(kNames[i], operands.inputs[i], shapes[i]);
    for (size_t i = 0; i < parts.size(); ++i) {
        std::vector<int64_t> shape = {operands.pages};
        shape.insert(shape.end(), parts[i].page_shape.begin(), parts[i].page_shape.end());
        require_shape(parts[i].name, operands.cache[i], shape);
    }
    return operands;
}

}  // namespace mla::ort
