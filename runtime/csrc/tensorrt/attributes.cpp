#include "tensorrt/attributes.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace mla::tensorrt {

namespace {

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

template <class Value>
struct Named {
    const char* name;
    Value value;
};

constexpr Named<mla_cuda_cache> kFormats[] = {
    {"int4", MLA_CUDA_CACHE_INT4}, {"int8", MLA_CUDA_CACHE_INT8}, {"fp16", MLA_CUDA_CACHE_FP16}};
constexpr Named<mla_cuda_mode> kModes[] = {
    {"auto", MLA_CUDA_AUTO}, {"absorbed", MLA_CUDA_ABSORBED}, {"expanded", MLA_CUDA_EXPANDED}};

// Gives *value what has this name; false where nothing has.
template <class Value, size_t Count>
bool choose(const Named<Value> (&names)[Count], const std::string& name, Value* value) {
    for (const Named<Value>& one : names) {
        if (name != one.name) continue;
        *value = one.value;
        return true;
    }
    return false;
}

// Calls visit(name, member) for every attribute, so that there is one list of them.
template <class AnyAttributes, class Visit>
void each(AnyAttributes& a, const Visit& visit) {
    visit("cache_format", a.cache_format);
    visit("kv_lora_rank", a.kv_lora_rank);
    visit("latent_norm_epsilon", a.latent_norm_epsilon);
    visit("mode", a.mode);
    visit("num_heads", a.num_heads);
    visit("qk_nope_head_dim", a.qk_nope_head_dim);
    visit("qk_rope_head_dim", a.qk_rope_head_dim);
    visit("softmax_scale", a.softmax_scale);
    visit("v_head_dim", a.v_head_dim);
}

PluginField field(const char* name, const std::string& value) {
    return {name, value.data(), PluginFieldType::kCHAR, static_cast<int32_t>(value.size())};
}

PluginField field(const char* name, const int32_t& value) {
    return {name, &value, PluginFieldType::kINT32, 1};
}

PluginField field(const char* name, const float& value) {
    return {name, &value, PluginFieldType::kFLOAT32, 1};
}

// A string may come with its final zero or without.
void read(const PluginField& field, std::string* value) {
    const char* text = static_cast<const char*>(field.data);
    value->assign(text, std::find(text, text + field.length, '\0'));
}

template <class Number>
void read(const PluginField& field, Number* value) {
    std::memcpy(value, field.data, sizeof *value);
}

std::invalid_argument wrong(const char* name, const char* what) {
    return std::invalid_argument(std::string("LatentAttention: attribute ") + name + " " + what +
                                 ": export the model again");
}

template <class Value>
void find(const nvinfer1::PluginFieldCollection& fields, const char* name, Value* value) {
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        const PluginField& given = fields.fields[i];
        if (std::strcmp(given.name, name) != 0) continue;
        if (given.type != field(name, *value).type || given.length < 1 || !given.data)
            throw wrong(name, "is of another type than this library knows");
        return read(given, value);
    }
    throw wrong(name, "is missing");
}

}  // namespace

mla_cuda_attention Attributes::call() const {
    mla_cuda_attention call = {};
    call.size = sizeof call;
    call.batch = call.steps = call.table_pages = call.pages = 1;
    call.heads = num_heads;
    call.nope = qk_nope_head_dim;
    call.rank = kv_lora_rank;
    call.rope = qk_rope_head_dim;
    call.v = v_head_dim;
    call.softmax_scale = softmax_scale;
    call.latent_norm_epsilon = latent_norm_epsilon;
    choose(kFormats, cache_format, &call.cache_format);
    choose(kModes, mode, &call.mode);
    return call;
}

const std::vector<PluginField>& field_names() {
    static const std::vector<PluginField> names = [] {
        const Attributes attributes;
        std::vector<PluginField> fields = to_fields(attributes);
        for (PluginField& one : fields) one = {one.name, nullptr, one.type, one.length};
        return fields;
    }();
    return names;
}

std::vector<PluginField> to_fields(const Attributes& attributes) {
    std::vector<PluginField> fields;
    each(attributes,
         [&](const char* name, const auto& value) { fields.push_back(field(name, value)); });
    return fields;
}

Attributes from_fields(const nvinfer1::PluginFieldCollection& fields) {
    Attributes attributes;
    each(attributes, [&](const char* name, auto& value) { find(fields, name, &value); });
    mla_cuda_attention call = attributes.call();
    if (!choose(kFormats, attributes.cache_format, &call.cache_format))
        throw wrong("cache_format", "is none of int4, int8 and fp16");
    if (!choose(kModes, attributes.mode, &call.mode))
        throw wrong("mode", "is none of auto, absorbed and expanded");
    size_t bytes = 0;
    if (mla_cuda_workspace_bound(&call, &bytes) != MLA_CUDA_OK)
        throw std::invalid_argument(std::string("LatentAttention: ") + mla_cuda_last_error());
    return attributes;
}

}  // namespace mla::tensorrt
