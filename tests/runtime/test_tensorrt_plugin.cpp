// The plugin without TensorRT: what a builder and an execution context ask of it, on kernels that
// run on the host. Run by test_tensorrt_plugin.py.
#include <NvInferRuntime.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "mla_deploy/cuda.h"

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);

#define CHECK(condition)                                                \
    do {                                                                \
        if (!(condition)) {                                             \
            std::printf("line %d: not so: %s\n", __LINE__, #condition); \
            std::exit(1);                                               \
        }                                                               \
    } while (0)

namespace {

constexpr int kHeads = 2, kNope = 16, kRope = 16, kV = 8, kRank = 256;
constexpr int64_t kBatch = 2, kSteps = 3, kTable = 2, kPages = 5;
constexpr int kInputs = 14, kOutputs = 6;

// ---- fields -------------------------------------------------------------------------------------

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

IPluginCreatorV3One* creator(int32_t index) {
    int32_t count = 0;
    IPluginCreatorInterface* const* all = getCreators(count);
    CHECK(count == 2);
    return static_cast<IPluginCreatorV3One*>(all[index]);
}

std::unique_ptr<IPluginV3> create(const std::vector<PluginField>& fields) {
    const PluginFieldCollection collection = {static_cast<int32_t>(fields.size()), fields.data()};
    return std::unique_ptr<IPluginV3>(
        creator(0)->createPlugin("layer", &collection, TensorRTPhase::kBUILD));
}

IPluginV3OneCore* core(IPluginV3& plugin) {
    return static_cast<IPluginV3OneCore*>(
        plugin.getCapabilityInterface(PluginCapabilityType::kCORE));
}

IPluginV3OneBuildV2* build(IPluginV3& plugin) {
    return static_cast<IPluginV3OneBuildV2*>(
        plugin.getCapabilityInterface(PluginCapabilityType::kBUILD));
}

IPluginV3OneRuntime* runtime(IPluginV3& plugin) {
    return static_cast<IPluginV3OneRuntime*>(
        plugin.getCapabilityInterface(PluginCapabilityType::kRUNTIME));
}

std::map<std::string, std::string> bytes_of(const PluginFieldCollection& fields) {
    std::map<std::string, std::string> found;
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        const PluginField& one = fields.fields[i];
        const size_t width = one.type == PluginFieldType::kCHAR ? 1 : 4;
        found[one.name] = std::string(static_cast<const char*>(one.data), width * one.length);
    }
    return found;
}

void test_creators() {
    const char* const namespaces[] = {"ai.mla_deploy", ""};
    for (int32_t i = 0; i < 2; ++i) {
        CHECK(std::string(creator(i)->getPluginName()) == "LatentAttention");
        CHECK(std::string(creator(i)->getPluginVersion()) == "1");
        CHECK(std::string(creator(i)->getPluginNamespace()) == namespaces[i]);
        const PluginFieldCollection* names = creator(i)->getFieldNames();
        const Fields fields;
        const std::vector<PluginField> mine = fields.list();
        CHECK(names->nbFields == static_cast<int32_t>(mine.size()));
        for (const PluginField& one : mine) {
            bool is_there = false;
            for (int32_t k = 0; k < names->nbFields; ++k)
                is_there |= std::string(names->fields[k].name) == one.name &&
                            names->fields[k].type == one.type;
            CHECK(is_there);
        }
    }
}

void test_round_trip() {
    const auto plugin = create(Fields().list());
    CHECK(plugin);
    CHECK(std::string(core(*plugin)->getPluginNamespace()) == "ai.mla_deploy");
    const PluginFieldCollection* stored = runtime(*plugin)->getFieldsToSerialize();
    const auto wanted = bytes_of(*stored);
    CHECK(wanted.size() == Fields().list().size());
    CHECK(wanted.at("cache_format") == "int4");
    const std::unique_ptr<IPluginV3> again(
        creator(1)->createPlugin("layer", stored, TensorRTPhase::kRUNTIME));
    CHECK(again);
    CHECK(bytes_of(*runtime(*again)->getFieldsToSerialize()) == wanted);
    CHECK(std::string(core(*again)->getPluginNamespace()).empty());
    const std::unique_ptr<IPluginV3> copy(plugin->clone());
    CHECK(bytes_of(*runtime(*copy)->getFieldsToSerialize()) == wanted);
    const std::unique_ptr<IPluginV3> attached(runtime(*plugin)->attachToContext(nullptr));
    CHECK(bytes_of(*runtime(*attached)->getFieldsToSerialize()) == wanted);
}

void test_fields_that_do_not_fit() {
    Fields fields;
    fields.strings["cache_format"] = std::string("int4\0", 5);  // with its final zero
    CHECK(create(fields.list()));
    fields.strings["cache_format"] = "int3";
    CHECK(!create(fields.list()));
    const Fields good;
    fields = good;
    fields.ints["kv_lora_rank"] = 320;
    CHECK(!create(fields.list()));
    std::vector<PluginField> list = good.list();
    list[0].type = PluginFieldType::kINT64;
    CHECK(!create(list));
    list = good.list();
    list.pop_back();
    CHECK(!create(list));
}

// ---- shapes and types ---------------------------------------------------------------------------

struct Number final : apiv::VDimensionExpr {
    explicit Number(int64_t value) : value(value) {}
    bool isConstant() const override { return true; }
    int64_t getConstantValue() const override { return value; }
    bool isSizeTensor() const override { return false; }
    int64_t value;
};

struct Expression final : IDimensionExpr {
    explicit Expression(int64_t value) : number(value) { mImpl = &number; }
    Number number;
};

struct Numbers final : apiv::VExprBuilder {
    const IDimensionExpr* constant(int64_t value) override {
        made.push_back(std::make_unique<Expression>(value));
        return made.back().get();
    }
    const IDimensionExpr* operation(DimensionOperation, const IDimensionExpr&,
                                    const IDimensionExpr&) override {
        return nullptr;
    }
    const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&,
                                            const IDimensionExpr&) override {
        return nullptr;
    }
    std::vector<std::unique_ptr<Expression>> made;
};

struct Builder final : IExprBuilder {
    Builder() { mImpl = &numbers; }
    Numbers numbers;
};

struct Tensor {
    std::vector<int64_t> shape;
    DataType type;
};

std::vector<Tensor> tensors(DataType real) {
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

Dims dims(const std::vector<int64_t>& shape) {
    Dims dims = {};
    dims.nbDims = static_cast<int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

std::vector<DynamicPluginTensorDesc> described(const std::vector<Tensor>& tensors) {
    std::vector<DynamicPluginTensorDesc> all;
    for (const Tensor& one : tensors) {
        DynamicPluginTensorDesc desc = {};
        desc.desc = {dims(one.shape), one.type, TensorFormat::kLINEAR, 1.0f};
        desc.min = desc.max = desc.opt = desc.desc.dims;
        all.push_back(desc);
    }
    return all;
}

void test_shapes() {
    const auto plugin = create(Fields().list());
    Builder builder;
    std::vector<DimsExprs> in, out(kOutputs);
    const std::vector<Tensor> all = tensors(DataType::kHALF);
    for (int32_t i = 0; i < kInputs; ++i) {
        DimsExprs one = {};
        one.nbDims = static_cast<int32_t>(all[i].shape.size());
        for (int32_t axis = 0; axis < one.nbDims; ++axis)
            one.d[axis] = builder.constant(all[i].shape[axis]);
        in.push_back(one);
    }
    IPluginV3OneBuildV2* const b = build(*plugin);
    CHECK(b->getNbOutputs() == kOutputs);
    CHECK(!b->getOutputShapes(in.data(), kInputs, nullptr, 0, out.data(), kOutputs, builder));
    for (int32_t i = 0; i < kOutputs; ++i) {
        const std::vector<int64_t>& wanted = all[kInputs + i].shape;
        CHECK(out[i].nbDims == static_cast<int32_t>(wanted.size()));
        for (size_t axis = 0; axis < wanted.size(); ++axis)
            CHECK(out[i].d[axis]->getConstantValue() == wanted[axis]);
    }
    CHECK(b->getOutputShapes(in.data(), kInputs - 1, nullptr, 0, out.data(), kOutputs, builder));
    CHECK(b->getAliasedInput(0) == -1);
    for (int32_t i = 1; i < kOutputs; ++i) CHECK(b->getAliasedInput(i) == 8 + i);
}

void test_types() {
    const auto plugin = create(Fields().list());
    IPluginV3OneBuildV2* const b = build(*plugin);
    for (const DataType real : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16}) {
        std::vector<DynamicPluginTensorDesc> all = described(tensors(real));
        std::vector<DataType> in, out(kOutputs);
        for (int32_t i = 0; i < kInputs; ++i) in.push_back(all[i].desc.type);
        CHECK(!b->getOutputDataTypes(out.data(), kOutputs, in.data(), kInputs));
        for (int32_t i = 0; i < kInputs + kOutputs; ++i) {
            if (i >= kInputs) CHECK(out[i - kInputs] == all[i].desc.type);
            CHECK(b->supportsFormatCombination(i, all.data(), kInputs, kOutputs));
            const PluginTensorDesc kept = all[i].desc;
            all[i].desc.type = DataType::kUINT8;
            CHECK(!b->supportsFormatCombination(i, all.data(), kInputs, kOutputs));
            all[i].desc = kept;
            all[i].desc.format = TensorFormat::kHWC8;
            CHECK(!b->supportsFormatCombination(i, all.data(), kInputs, kOutputs));
            all[i].desc = kept;
        }
        all[1].desc.type = real == DataType::kHALF ? DataType::kFLOAT : DataType::kHALF;
        CHECK(!b->supportsFormatCombination(1, all.data(), kInputs, kOutputs));
    }
}

void test_shapes_that_do_not_fit() {
    const auto plugin = create(Fields().list());
    const std::vector<Tensor> good = tensors(DataType::kHALF);
    const auto configured = [&](const std::vector<Tensor>& tensors) {
        const auto all = described(tensors);
        std::vector<PluginTensorDesc> plain;
        for (const DynamicPluginTensorDesc& one : all) plain.push_back(one.desc);
        const int32_t first =
            build(*plugin)->configurePlugin(all.data(), kInputs, all.data() + kInputs, kOutputs);
        CHECK(first == runtime(*plugin)->onShapeChange(plain.data(), kInputs,
                                                       plain.data() + kInputs, kOutputs));
        return first == 0;
    };
    CHECK(configured(good));
    std::vector<Tensor> dynamic = good;
    for (const int32_t i : {0, 1, 2, 3}) dynamic[i].shape[1] = -1;
    dynamic[6].shape[1] = -1;
    CHECK(configured(dynamic));
    for (int32_t i = 0; i < kInputs; ++i) {
        std::vector<Tensor> bad = good;
        bad[i].shape.back() += 1;
        CHECK(configured(bad) == (i == 6));  // a block table may be of any length
        bad[i].shape.push_back(1);
        bad[i].shape[bad[i].shape.size() - 2] -= i < 9 ? 1 : 0;
        CHECK(!configured(bad));
    }
}

// ---- running ------------------------------------------------------------------------------------

size_t element_bytes(DataType type) {
    return type == DataType::kINT64   ? 8
           : type == DataType::kFLOAT ? 4
           : type == DataType::kINT8  ? 1
                                      : 2;
}

struct Memory {
    explicit Memory(size_t bytes) : block(bytes + 256, 0x5a) {
        const uintptr_t start = reinterpret_cast<uintptr_t>(block.data());
        at = reinterpret_cast<uint8_t*>((start + 255) / 256 * 256);
    }
    Memory(Memory&&) = default;  // the block stays where it is
    std::vector<uint8_t> block;
    uint8_t* at;
};

// The plugin's call and the kernels' own, from one set of random inputs, in the type of float32.
void test_run(bool in_place) {
    const auto plugin = create(Fields().list());
    const std::vector<Tensor> all = tensors(DataType::kFLOAT);
    const auto dynamic = described(all);
    std::vector<PluginTensorDesc> descriptions;
    for (const DynamicPluginTensorDesc& one : dynamic) descriptions.push_back(one.desc);
    std::mt19937 random(7);
    std::vector<Memory> mine, theirs;
    std::vector<size_t> sizes;
    for (size_t i = 0; i < all.size(); ++i) {
        size_t elements = 1;
        for (const int64_t size : all[i].shape) elements *= static_cast<size_t>(size);
        sizes.push_back(elements * element_bytes(all[i].type));
        Memory memory(sizes.back());
        std::memset(memory.at, 0, sizes.back());
        for (size_t k = 0; k < elements && i < 6; ++k) {
            const float value = std::normal_distribution<float>()(random);
            if (all[i].type == DataType::kFLOAT)
                reinterpret_cast<float*>(memory.at)[k] = value;
            else  // a half of 0.25 to 0.5, of either sign
                reinterpret_cast<uint16_t*>(memory.at)[k] =
                    static_cast<uint16_t>(0x3400 + random() % 0x400 + random() % 2 * 0x8000);
        }
        mine.emplace_back(sizes.back());
        std::memcpy(mine.back().at, memory.at, sizes.back());
        theirs.emplace_back(sizes.back());
        std::memcpy(theirs.back().at, memory.at, sizes.back());
    }
    const int64_t table[] = {3, 1, 4, 2}, past[] = {0, 0}, fresh[] = {3, 2};
    for (std::vector<Memory>* each : {&mine, &theirs}) {
        std::memcpy((*each)[6].at, table, sizeof table);
        std::memcpy((*each)[7].at, past, sizeof past);
        std::memcpy((*each)[8].at, fresh, sizeof fresh);
    }
    std::vector<const void*> in;
    std::vector<void*> out;
    for (int32_t i = 0; i < kInputs; ++i) in.push_back(mine[i].at);
    for (int32_t i = 0; i < kOutputs; ++i)
        out.push_back(i > 0 && in_place ? mine[8 + i].at : mine[kInputs + i].at);
    const size_t bytes = build(*plugin)->getWorkspaceSize(dynamic.data(), kInputs,
                                                          dynamic.data() + kInputs, kOutputs);
    CHECK(bytes > 0);
    Memory workspace(bytes);
    CHECK(!runtime(*plugin)->enqueue(descriptions.data(), descriptions.data() + kInputs, in.data(),
                                     out.data(), workspace.at, nullptr));

    mla_cuda_attention a = {};
    a.size = sizeof a;
    a.batch = kBatch;
    a.steps = kSteps;
    a.table_pages = kTable;
    a.heads = kHeads;
    a.nope = kNope;
    a.rank = kRank;
    a.rope = kRope;
    a.v = kV;
    a.cache_format = MLA_CUDA_CACHE_INT4;
    a.q = {theirs[0].at, MLA_CUDA_FP32, 0};
    a.kv = {theirs[1].at, MLA_CUDA_FP32, 0};
    a.output = {theirs[kInputs].at, MLA_CUDA_FP32, 0};
    a.cos = reinterpret_cast<float*>(theirs[2].at);
    a.sin = reinterpret_cast<float*>(theirs[3].at);
    a.w_uk = theirs[4].at;
    a.w_uv = theirs[5].at;
    a.block_table = reinterpret_cast<int64_t*>(theirs[6].at);
    a.past_lengths = reinterpret_cast<int64_t*>(theirs[7].at);
    a.new_lengths = reinterpret_cast<int64_t*>(theirs[8].at);
    a.pages = kPages;
    a.softmax_scale = 0.3f;
    a.latent_norm_epsilon = 1e-6f;
    for (int i = 0; i < 5; ++i) a.cache[i] = theirs[9 + i].at;
    CHECK(mla_cuda_workspace_bytes(&a, &a.workspace_bytes) == MLA_CUDA_OK);
    CHECK(a.workspace_bytes <= bytes);
    Memory own(a.workspace_bytes);
    a.workspace = own.at;
    CHECK(mla_cuda_latent_attention(&a, nullptr) == MLA_CUDA_OK);

    CHECK(!std::memcmp(out[0], theirs[kInputs].at, sizes[kInputs]));
    const float* output = static_cast<const float*>(out[0]);
    CHECK(std::isfinite(output[0]) && output[0] != 0);
    for (int i = 0; i < 5; ++i) CHECK(!std::memcmp(out[1 + i], theirs[9 + i].at, sizes[9 + i]));
    CHECK(runtime(*plugin)->enqueue(descriptions.data(), descriptions.data() + kInputs, in.data(),
                                    out.data(), nullptr, nullptr) == 1);  // no workspace
}

}  // namespace

int main() {
    test_creators();
    test_round_trip();
    test_fields_that_do_not_fit();
    test_shapes();
    test_types();
    test_shapes_that_do_not_fit();
    test_run(true);
    test_run(false);
    std::printf("ok\n");
}
