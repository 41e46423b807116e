// Every instruction set that runs here against the portable kernels, on random inputs: for machines
// without Python, such as an emulated aarch64. Exits with 1 and a line that says what differed.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cpu/latent_attention.h"
#include "cpu/thread_pool.h"

namespace {

using namespace mla::cpu;

void check(Status status) {
    if (status == Status::kOk) return;
    std::printf("FAILED: %s\n", last_error());
    std::exit(1);
}

struct Result {
    std::vector<float> output;
    std::vector<std::vector<uint8_t>> parts;
};

struct Case {
    AttentionDims dims;
    CacheFormat format;
    AttentionMode mode;
    WeightPrecision precision;
    std::vector<int64_t> past, fresh;
};

// Fills the past through the call itself (append of all tokens), then attends to the new ones.
Result run(const Case& c, Isa isa, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    const int64_t batch = static_cast<int64_t>(c.past.size());
    int64_t longest = 0, steps = 0;
    for (int64_t b = 0; b < batch; ++b) {
        longest = std::max(longest, c.past[b] + c.fresh[b]);
        steps = std::max(steps, c.fresh[b]);
    }
    const int64_t table_pages = (longest + kPageTokens - 1) / kPageTokens;
    const AttentionDims& d = c.dims;
    const auto fill = [&](int64_t count, float scale) {
        std::vector<float> x(static_cast<size_t>(count));
        for (float& value : x) value = normal(random) * scale;
        return x;
    };
    std::vector<int64_t> table(static_cast<size_t>(batch * table_pages));
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int64_t>(table.size() - i);
    const auto w_uk = fill(int64_t{d.heads} * d.nope * d.rank, 1 / std::sqrt(1.0f * d.rank));
    const auto w_uv = fill(int64_t{d.heads} * d.rank * d.v, 1 / std::sqrt(1.0f * d.rank));
    WeightsDesc desc;
    desc.dims = d;
    desc.w_uk = w_uk.data();
    desc.w_uv = w_uv.data();
    desc.precision = c.precision;
    PreparedWeights* weights = nullptr;
    check(prepare_weights(desc, &weights));
    Workspace* workspace = create_workspace();
    ThreadPool pool(2);
    Result result;
    LatentAttentionParams p;
    p.isa = isa;
    p.mode = c.mode;
    p.batch = batch;
    p.table_pages = table_pages;
    p.weights = weights;
    p.block_table = table.data();
    p.softmax_scale = 2.5f / std::sqrt(1.0f * (d.nope + d.rope));
    p.latent_norm_epsilon = 1e-6f;
    p.workspace = workspace;
    p.parallel = pool.parallel_for();
    p.cache.format = c.format;
    p.cache.pages = static_cast<int64_t>(table.size()) + 1;
    PartInfo info[kMaxParts];
    int count = 0;
    check(cache_parts(c.format, d.rank, d.rope, info, &count));
    for (int i = 0; i < count; ++i) {
        result.parts.emplace_back(static_cast<size_t>(p.cache.pages * info[i].page_bytes));
        p.cache.parts[i] = result.parts.back().data();
    }
    const auto step = [&](const std::vector<int64_t>& past, const std::vector<int64_t>& fresh,
                          int64_t width, bool append_only) {
        const auto q = fill(batch * width * d.heads * (d.nope + d.rope), 1);
        const auto kv = fill(batch * width * (d.rank + d.rope), 1);
        auto cos = fill(batch * width * d.rope / 2, 1), sin = cos;
        for (size_t i = 0; i < cos.size(); ++i)
            sin[i] = std::sin(cos[i]), cos[i] = std::cos(cos[i]);
        result.output.assign(static_cast<size_t>(batch * width * d.heads * d.v), NAN);
        p.steps = width;
        p.q = q.data();
        p.kv = kv.data();
        p.cos = cos.data();
        p.sin = sin.data();
        p.output = result.output.data();
        p.past_lengths = past.data();
        p.new_lengths = fresh.data();
        check(append_only ? latent_append(p) : latent_attention(p));
    };
    const std::vector<int64_t> none(static_cast<size_t>(batch), 0);
    int64_t most = 0;
    for (const int64_t n : c.past) most = std::max(most, n);
    if (most) step(none, c.past, most, true);
    step(c.past, c.fresh, steps, false);
    free_weights(weights);
    free_workspace(workspace);
    return result;
}

double relative_error(const std::vector<float>& found, const std::vector<float>& expected) {
    double gap = 0, size = 0;
    for (size_t k = 0; k < found.size(); ++k) {
        gap += std::pow(found[k] - expected[k], 2.0);
        size += std::pow(expected[k], 2.0);
    }
    return std::sqrt(gap / size);
}

// Integers and roundings are the same in all NEON kernels, however they multiply.
bool is_neon(Isa isa) { return isa >= Isa::kNeon && isa <= Isa::kNeonI8mm; }

bool same_bits(const std::vector<float>& x, const std::vector<float>& y) {
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
}

std::vector<Isa> isas_here() {
    std::vector<Isa> found;
    for (int i = static_cast<int>(Isa::kAvx2); i <= static_cast<int>(Isa::kNeonI8mm); ++i) {
        Isa isa;
        if (resolve_isa(static_cast<Isa>(i), &isa) == Status::kOk) found.push_back(isa);
    }
    return found;
}

}  // namespace

int main() {
    const char* formats[] = {"int4", "int8", "fp16", "fp32"};
    const AttentionDims sizes[] = {{5, 32, 128, 32, 24}, {17, 20, 96, 20, 12}, {2, 16, 16, 16, 16}};
    const std::vector<Isa> isas = isas_here();
    std::vector<std::array<double, 3>> worst(isas.size());
    int compared = 0;
    for (const AttentionDims& dims : sizes)
        for (int format = 0; format < 4; ++format) {
            for (const AttentionMode mode : {AttentionMode::kAbsorbed, AttentionMode::kExpanded})
                for (int precision = 0; precision < 3; ++precision) {
                    const Case c = {dims,         static_cast<CacheFormat>(format),
                                    mode,         static_cast<WeightPrecision>(precision),
                                    {130, 0, 63}, {2, 9, 1}};
                    const Result expected = run(c, Isa::kPortable, 7);
                    Result neon;
                    for (size_t i = 0; i < isas.size(); ++i) {
                        const Result found = run(c, isas[i], 7);
                        const double relative = relative_error(found.output, expected.output);
                        worst[i][precision] = std::max(worst[i][precision], relative);
                        const double limit = precision == 0 ? 3e-5 : 2.5e-2;
                        const bool close = relative < limit, equal = found.parts == expected.parts;
                        if (isas[i] == Isa::kNeon) neon = found;
                        const bool alike =
                            !is_neon(isas[i]) || same_bits(found.output, neon.output);
                        if (!close || !equal || !alike) {
                            std::printf(
                                "FAILED: %s %s heads %d rank %d mode %d precision %d: "
                                "relative error %.2e, cache bytes %s%s\n",
                                isa_name(isas[i]), formats[format], dims.heads, dims.rank,
                                static_cast<int>(mode), precision, relative,
                                equal ? "equal" : "differ", alike ? "" : ", output not neon's");
                            return 1;
                        }
                        ++compared;
                    }
                }
            // To stderr: an emulator is slow, and stdout appears at the end when it is a pipe.
            std::fprintf(stderr, "rank %d, %s done\n", dims.rank, formats[format]);
        }
    for (size_t i = 0; i < isas.size(); ++i)
        std::printf("%s: relative error at most %.1e (fp32 weights), %.1e (bf16), %.1e (int8)\n",
                    isa_name(isas[i]), worst[i][0], worst[i][1], worst[i][2]);
    std::printf("%d comparisons\n", compared);
    return compared ? 0 : 1;
}
