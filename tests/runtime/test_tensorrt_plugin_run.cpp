// The plugin without TensorRT: its result against that of the kernels, which run on the host.
// Run by test_tensorrt_plugin.py.
#include <cmath>
#include <cstring>
#include <random>

#include "mla_deploy/cuda.h"
#include "tensorrt_plugin.h"

namespace {

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
// Gives the output.
std::vector<float> test_run(bool in_place, const char* mode_name, mla_cuda_mode mode) {
    Fields fields;
    fields.strings["mode"] = mode_name;
    const auto plugin = create(fields.list());
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
    a.mode = mode;
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
    return {output, output + sizes[kInputs] / sizeof(float)};
}

}  // namespace

int main() {
    const std::vector<float> absorbed = test_run(true, "auto", MLA_CUDA_AUTO);
    CHECK(test_run(false, "absorbed", MLA_CUDA_ABSORBED) == absorbed);
    CHECK(test_run(true, "expanded", MLA_CUDA_EXPANDED) != absorbed);
    std::printf("ok\n");
}
