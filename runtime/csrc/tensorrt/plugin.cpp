#include "tensorrt/plugin.h"

#include <algorithm>
#include <stdexcept>

#include "tensorrt/log.h"

namespace mla::tensorrt {

namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginTensorDesc;

constexpr const char* kNames[] = {"q",    "kv",          "cos",          "sin",        "w_uk",
                                  "w_uv", "block_table", "past_lengths", "new_lengths"};

mla_cuda_type real_type(DataType type) {
    return type == DataType::kFLOAT  ? MLA_CUDA_FP32
           : type == DataType::kHALF ? MLA_CUDA_FP16
                                     : MLA_CUDA_BF16;
}

// Calls function(); what it throws becomes a text in the log and a 1.
template <class Function>
int32_t guarded(const Function& function) noexcept {
    try {
        function();
        return 0;
    } catch (const std::exception& error) {
        log_error(error.what());
        return 1;
    }
}

void check_cuda(mla_cuda_status status) {
    if (status != MLA_CUDA_OK)
        throw std::runtime_error(std::string("LatentAttention: ") + mla_cuda_last_error());
}

std::string text(const Dims& dims) {
    std::string text = "[";
    for (int32_t axis = 0; axis < dims.nbDims; ++axis)
        text += (axis ? ", " : "") + std::to_string(dims.d[axis]);
    return text + "]";
}

// Sizes of -1 are not known yet.
bool fits(const Dims& found, const std::vector<int64_t>& wanted) {
    if (found.nbDims != static_cast<int32_t>(wanted.size())) return false;
    const int64_t* size = found.d;
    for (const int64_t one : wanted) {
        if (*size >= 0 && one >= 0 && *size != one) return false;
        ++size;
    }
    return true;
}

int64_t page_elements(const Dims& dims) {
    int64_t count = 1;
    for (int32_t axis = 1; axis < dims.nbDims; ++axis) count *= dims.d[axis];
    return count;
}

std::invalid_argument wrong_shape(const char* name, const Dims& found) {
    return std::invalid_argument(std::string("LatentAttention: input ") + name + " has shape " +
                                 text(found) +
                                 ", which does not fit the node's attributes and its other "
                                 "inputs: export the model again");
}

}  // namespace

LatentAttentionPlugin::LatentAttentionPlugin(const Attributes& attributes, const char* name_space)
    : attributes_(attributes), namespace_(name_space), fields_(to_fields(attributes_)) {
    const mla_cuda_attention call = attributes_.call();
    check_cuda(mla_cuda_cache_parts(&call, records_, &parts_));
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
}

nvinfer1::IPluginCapability* LatentAttentionPlugin::getCapabilityInterface(
    nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuildV2*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* LatentAttentionPlugin::clone() noexcept {
    nvinfer1::IPluginV3* copy = nullptr;
    guarded([&] { copy = new LatentAttentionPlugin(attributes_, namespace_); });
    return copy;
}

nvinfer1::IPluginV3* LatentAttentionPlugin::attachToContext(
    nvinfer1::IPluginResourceContext*) noexcept {
    return clone();
}

const nvinfer1::PluginFieldCollection* LatentAttentionPlugin::getFieldsToSerialize() noexcept {
    return &collection_;
}

// ---- building -----------------------------------------------------------------------------------

int32_t LatentAttentionPlugin::configurePlugin(const DynamicPluginTensorDesc* in, int32_t inputs,
                                               const DynamicPluginTensorDesc*,
                                               int32_t outputs) noexcept {
    return guarded([&] {
        std::vector<const Dims*> dims;
        for (int32_t i = 0; i < inputs; ++i) dims.push_back(&in[i].desc.dims);
        check(dims.data(), inputs, outputs);
    });
}

int32_t LatentAttentionPlugin::getOutputDataTypes(DataType* out, int32_t outputs,
                                                  const DataType* in,
                                                  int32_t inputs) const noexcept {
    if (inputs != kCache + parts_ || outputs != 1 + parts_) return 1;
    out[0] = in[kQ];
    std::copy_n(in + kCache, parts_, out + 1);
    return 0;
}

int32_t LatentAttentionPlugin::getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs,
                                               const nvinfer1::DimsExprs*, int32_t,
                                               nvinfer1::DimsExprs* out, int32_t outputs,
                                               nvinfer1::IExprBuilder& builder) noexcept {
    if (inputs != kCache + parts_ || outputs != 1 + parts_) return 1;
    const int64_t width = int64_t{attributes_.num_heads} * attributes_.v_head_dim;
    out[0] = {3, {in[kQ].d[0], in[kQ].d[1], builder.constant(width)}};
    std::copy_n(in + kCache, parts_, out + 1);
    return 0;
}

bool LatentAttentionPlugin::supportsFormatCombination(int32_t position,
                                                      const DynamicPluginTensorDesc* all,
                                                      int32_t inputs, int32_t outputs) noexcept {
    if (inputs != kCache + parts_ || outputs != 1 + parts_) return false;
    const PluginTensorDesc& one = all[position].desc;
    if (one.format != nvinfer1::TensorFormat::kLINEAR) return false;
    if (position == kQ)
        return one.type == DataType::kFLOAT || one.type == DataType::kHALF ||
               one.type == DataType::kBF16;
    if (position == kKv || position == inputs) return one.type == all[kQ].desc.type;
    if (position < kWUk) return one.type == DataType::kFLOAT;
    if (position < kBlockTable) return one.type == DataType::kHALF;
    if (position < kCache) return one.type == DataType::kINT64;
    const int32_t part = position < inputs ? position - kCache : position - inputs - 1;
    return one.type == (records_[part].element_bytes == 1 ? DataType::kINT8 : DataType::kHALF);
}

size_t LatentAttentionPlugin::getWorkspaceSize(const DynamicPluginTensorDesc* in, int32_t,
                                               const DynamicPluginTensorDesc*,
                                               int32_t) const noexcept {
    // An engine may be built where there is no GPU, or a smaller one: enough for any.
    const mla_cuda_attention most = call(in[kQ].max, in[kBlockTable].max, in[kCache].max);
    size_t bytes = 0;
    guarded([&] { check_cuda(mla_cuda_workspace_bound(&most, &bytes)); });
    return bytes;
}

int32_t LatentAttentionPlugin::getAliasedInput(int32_t output) noexcept {
    return output == 0 ? -1 : kCache + output - 1;
}

// ---- running ------------------------------------------------------------------------------------

int32_t LatentAttentionPlugin::onShapeChange(const PluginTensorDesc* in, int32_t inputs,
                                             const PluginTensorDesc*, int32_t outputs) noexcept {
    return guarded([&] {
        std::vector<const Dims*> dims;
        for (int32_t i = 0; i < inputs; ++i) dims.push_back(&in[i].dims);
        check(dims.data(), inputs, outputs);
    });
}

int32_t LatentAttentionPlugin::enqueue(const PluginTensorDesc* in_desc, const PluginTensorDesc*,
                                       const void* const* in, void* const* out, void* workspace,
                                       cudaStream_t stream) noexcept {
    return guarded([&] {
        mla_cuda_attention a =
            call(in_desc[kQ].dims, in_desc[kBlockTable].dims, in_desc[kCache].dims);
        const mla_cuda_type type = real_type(in_desc[kQ].type);
        a.q = {const_cast<void*>(in[kQ]), type, 0};  // only read
        a.kv = {const_cast<void*>(in[kKv]), type, 0};
        a.output = {out[0], type, 0};
        a.cos = static_cast<const float*>(in[kCos]);
        a.sin = static_cast<const float*>(in[kSin]);
        a.w_uk = in[kWUk];
        a.w_uv = in[kWUv];
        a.block_table = static_cast<const int64_t*>(in[kBlockTable]);
        a.past_lengths = static_cast<const int64_t*>(in[kPastLengths]);
        a.new_lengths = static_cast<const int64_t*>(in[kNewLengths]);
        for (int32_t part = 0; part < parts_; ++part) {
            a.cache[part] = out[1 + part];
            if (a.cache[part] == in[kCache + part]) continue;  // as getAliasedInput() asks
            const size_t bytes = static_cast<size_t>(a.pages * records_[part].page_bytes);
            check_cuda(mla_cuda_copy(a.cache[part], in[kCache + part], bytes, stream));
        }
        a.workspace = workspace;
        check_cuda(mla_cuda_workspace_bound(&a, &a.workspace_bytes));
        check_cuda(mla_cuda_latent_attention(&a, stream));
    });
}

mla_cuda_attention LatentAttentionPlugin::call(const Dims& q, const Dims& table,
                                               const Dims& cache) const {
    mla_cuda_attention call = attributes_.call();
    call.batch = q.d[0];
    call.steps = q.d[1];
    call.table_pages = table.d[1];
    call.pages = cache.d[0];
    return call;
}

void LatentAttentionPlugin::check(const Dims* const* in, int32_t inputs, int32_t outputs) const {
    if (inputs != kCache + parts_ || outputs != 1 + parts_)
        throw std::invalid_argument("LatentAttention: the node has " + std::to_string(inputs) +
                                    " inputs and " + std::to_string(outputs) + " outputs, not " +
                                    std::to_string(kCache + parts_) + " and " +
                                    std::to_string(1 + parts_) + ": export the model again");
    const Attributes& a = attributes_;
    const int64_t heads = a.num_heads, nope = a.qk_nope_head_dim, rank = a.kv_lora_rank;
    const int64_t rope = a.qk_rope_head_dim, v = a.v_head_dim;
    const int64_t batch = in[kQ]->nbDims == 3 ? in[kQ]->d[0] : -1;
    const int64_t steps = in[kQ]->nbDims == 3 ? in[kQ]->d[1] : -1;
    const std::vector<int64_t> shapes[] = {
        {batch, steps, heads * (nope + rope)},
        {batch, steps, rank + rope},
        {batch, steps, rope / 2},
        {batch, steps, rope / 2},
        {heads, nope, rank},
        {heads, rank, v},
        {batch, -1},
        {batch},
        {batch},
    };
    for (int32_t i = 0; i < kCache; ++i)
        if (!fits(*in[i], shapes[i])) throw wrong_shape(kNames[i], *in[i]);
    const int64_t pages = in[kCache]->d[0];
    for (int32_t part = 0; part < parts_; ++part) {
        const Dims& found = *in[kCache + part];
        const mla_cuda_part& record = records_[part];
        if (found.nbDims < 2 || found.d[0] != pages ||
            page_elements(found) * record.element_bytes != record.page_bytes)
            throw wrong_shape("cache", found);
    }
}

}  // namespace mla::tensorrt
