// What the plugin's tests share: calls of it as TensorRT makes them, and one node's attributes and
// tensors.
#pragma once

#include <NvInferRuntime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);

#define CHECK(condition)                                                \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("line %d: not so: %s\n", __LINE__, #condition); \
            std::exit(1);                                               \
        }                                                               \
    } while (0)

constexpr int kHeads = 2, kNope = 16, kRope = 16, kV = 8, kRank = 256;
constexpr int64_t kBatch = 2, kSteps = 3, kTable = 2, kPages = 5;
constexpr int kInputs = 14, kOutputs = 6;

struct Fields {
    std::map<std::string, int32_t> ints = {{"kv_lora_rank", kRank},
                                           {"num_heads", kHeads},
                                           {"qk_nope_head_dim", kNope},
                                           {"qk_rope_head_dim", kRope},
                                           {"v_head_dim", kV}};
    std::map<std::string, float> floats = {{"latent_norm_epsilon", 1e-6f}, {"softmax_scale", 0.3f}};
    std::map<std::string, std::string> strings = {{"cache_format", "int4"}, {"mode", "auto"}};

    std::vector<PluginField> list() const {
        std::vector<PluginField> all;
        for (const auto& [name, value] : ints)
            all.push_back({name.c_str(), &value, PluginFieldType::kINT32, 1});
        for (const auto& [name, value] : floats)
            all.push_back({name.c_str(), &value, PluginFieldType::kFLOAT32, 1});
        for (const auto& [name, value] : strings)
            all.push_back({name.c_str(), value.data(), PluginFieldType::kCHAR,
                           static_cast<int32_t>(value.size())});
        return all;
    }
};

inline IPluginCreatorV3One* creator(int32_t index) {
    int32_t count = 0;
    IPluginCreatorInterface* const* all = getCreators(count);
    CHECK(count == 2);
    return static_cast<IPluginCreatorV3One*>(all[index]);
}

inline std::unique_ptr<IPluginV3> create(const std::vector<PluginField>& fields) {
    const PluginFieldCollection collection = {static_cast<int32_t>(fields.size()), fields.data()};
    return std::unique_ptr<IPluginV3>(
        creator(0)->createPlugin("layer", &collection, TensorRTPhase::kBUILD));
}

inline IPluginV3OneCore* core(IPluginV3& plugin) {
    return static_cast<IPluginV3OneCore*>(
        plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
}

inline IPluginV3OneBuildV2* build(IPluginV3& plugin) {
    return static_cast<IPluginV3OneBuildV2*>(
        plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}

inline IPluginV3OneRuntime* runtime(IPluginV3& plugin) {
    return static_cast<IPluginV3OneRuntime*>(
        plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

// The node's inputs and outputs, with an int4 cache.
struct Tensor {
    std::vector<int64_t> shape;
    DataType type;
};

inline std::vector<Tensor> tensors(DataType real) {
    const DataType f = DataType::kFLOAT, h = DataType::kHALF, i = DataType::kINT64;
    const DataType b = DataType::kINT8;
    return {{{kBatch, kSteps, kHeads * (kNope + kRope)}, real},
            {{kBatch, kSteps, kRank + kRope}, real},
            {{kBatch, kSteps, kRope / 2}, f},
            {{kBatch, kSteps, kRope / 2}, f},
            {{kHeads, kNope, kRank}, h},
            {{kHeads, kRank, kV}, h},
            {{kBatch, kTable}, i},
            {{kBatch}, i},
            {{kBatch}, i},
            {{kPages, 4, kRank / 8, 16, 4}, b},
            {{kPages, kRank / 64, 64}, h},
            {{kPages, kRank / 64, 64}, h},
            {{kPages, 4, kRope / 4, 16, 4}, b},
            {{kPages, kRope / 16, 64}, h},
            {{kBatch, kSteps, kHeads * kV}, real},
            {{kPages, 4, kRank / 8, 16, 4}, b},
            {{kPages, kRank / 64, 64}, h},
            {{kPages, kRank / 64, 64}, h},
            {{kPages, 4, kRope / 4, 16, 4}, b},
            {{kPages, kRope / 16, 64}, h}};
}

inline Dims dims(const std::vector<int64_t>& shape) {
    Dims dims = {};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

inline std::vector<DynamicPluginTensorDesc> described(const std::vector<Tensor>& tensors) {
    std::vector<DynamicPluginTensorDesc> all;
    for (const Tensor& one : tensors) {
        DynamicPluginTensorDesc desc = {};
        desc.desc = {dims(one.shape), one.type, TensorFormat::kLINEAR, 1.0f};
        desc.min = desc.max = desc.opt = desc.desc.dims;
        all.push_back(desc);
    }
    return all;
}
