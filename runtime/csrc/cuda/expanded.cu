#include "cuda/expanded.h"

#include "cuda/expand.h"
#include "cuda/expanded_launch.h"
#include "cuda/status.h"

namespace mla::cuda {
namespace {

constexpr int64_t kMinChunkTokens = 512;  // below, too much waits between chunks

int64_t rounded_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Calls use(kernel) with the smallest kernel that holds these heads; they fit one.
template <class Use>
auto choose(const mla_cuda_attention& a, const Use& use) {
    const int width = a.nope + a.rope;
    if (width <= 96 && a.v <= 64) return use(Expanded<96, 64, 2>());
    if (width <= 192 && a.v <= 128) return use(Expanded<192, 128, 2>());
    return use(Expanded<256, 256, 1>());
}

// What is left of a kernel when the plan is made.
struct Shape {
    int64_t rows, products, state_bytes;  // a block; a (query, key) pair; a block
};
Shape shape_of(const mla_cuda_attention& a) {
    return choose(a, [](auto kernel) {
        using Kernel = decltype(kernel);
        return Shape{Kernel::kRows, int64_t{8} * (Kernel::Keys::kChunks + Kernel::Values::kChunks),
                     int64_t{4} * Kernel::kStateFloats * Kernel::kThreads};
    });
}

int64_t token_bytes(const mla_cuda_attention& a) {
    return 2 * (int64_t{a.rank} + a.rope + int64_t{a.heads} * (a.nope + a.v));
}
// That a sequence can have, in whole kExpandTokens: one of these at least, as chunks are not less.
int64_t table_tokens(const mla_cuda_attention& a) {
    return a.table_pages ? rounded_up(a.table_pages * kPageTokens, kExpandTokens) : kExpandTokens;
}

int64_t chunk_tokens(const mla_cuda_attention& a, const Device& device) {
    const int64_t sequences = a.batch > 1 ? a.batch : 1;
    const int64_t affordable = device.chunk_bytes / (sequences * token_bytes(a));
    int64_t tokens = affordable / kExpandTokens * kExpandTokens;
    if (tokens < kExpandTokens) tokens = kExpandTokens;
    return tokens < table_tokens(a) ? tokens : table_tokens(a);
}

template <CacheFormat format>
mla_cuda_status launch_unpack(const Params& p, Stream stream) {
    const Grid grid = {p.chunk_tokens / kBlockTokens, 1, p.batch};
    MLA_LAUNCH(launch<Unpack<format>>(p, grid, Unpack<format>::kSharedBytes, stream));
    return MLA_CUDA_OK;
}

mla_cuda_status launch_chunk(const mla_cuda_attention& a, const Params& p, Stream stream) {
    MLA_TRY(a.cache_format == MLA_CUDA_CACHE_INT4   ? launch_unpack<CacheFormat::kInt4>(p, stream)
            : a.cache_format == MLA_CUDA_CACHE_INT8 ? launch_unpack<CacheFormat::kInt8>(p, stream)
                                                    : launch_unpack<CacheFormat::kFp16>(p, stream));
    const Grid grid = {Expand::column_blocks(p.nope) + Expand::column_blocks(p.v), p.heads,
                       int64_t{p.batch} * (p.chunk_tokens / kExpandTokens)};
    MLA_LAUNCH(launch<Expand>(p, grid, Expand::kSharedBytes, stream));
    MLA_LAUNCH(choose(a, [&](auto kernel) {
        using Kernel = decltype(kernel);
        const Grid blocks = {(p.round_steps + Kernel::kRows - 1) / Kernel::kRows, p.heads, p.batch};
        return launch<Kernel>(p, blocks, Kernel::kSharedBytes, stream);
    }));
    return MLA_CUDA_OK;
}

}  // namespace

bool can_expand(const mla_cuda_attention& a) { return a.nope + a.rope <= 256 && a.v <= 256; }

// Per key, S (2 D + R) products, or (rows of whole blocks) (products of a pair) + D (N + V).
bool should_expand(const mla_cuda_attention& a, const Device& device) {
    if (!can_expand(a)) return false;
    const Shape shape = shape_of(a);
    const int64_t absorbed = a.steps * (2 * int64_t{a.rank} + a.rope);
    const int64_t expanded =
        rounded_up(a.steps, shape.rows) * shape.products + int64_t{a.rank} * (a.nope + a.v);
    const int64_t tokens = chunk_tokens(a, device);
    return expanded < absorbed && (tokens >= kMinChunkTokens || tokens >= table_tokens(a));
}

ExpandedPlan plan_expanded(const mla_cuda_attention& a, const Device& device) {
    const Shape shape = shape_of(a);
    ExpandedPlan plan = {};
    plan.chunk_tokens = chunk_tokens(a, device);
    // One at least, as outputs of padded tokens are written with the first.
    const int64_t tokens = a.table_pages ? a.table_pages * kPageTokens : 1;
    plan.chunks = (tokens + plan.chunk_tokens - 1) / plan.chunk_tokens;
    const int64_t steps_bytes = a.batch * a.heads * shape.state_bytes;  // of one row of blocks
    int64_t blocks = (a.steps + shape.rows - 1) / shape.rows;
    if (plan.chunks > 1 && blocks * steps_bytes > device.chunk_bytes) {
        blocks = device.chunk_bytes / steps_bytes;
        if (blocks < 1) blocks = 1;
    }
    plan.round_steps = blocks * shape.rows < a.steps ? blocks * shape.rows : a.steps;
    const size_t halves = 2 * static_cast<size_t>(a.batch * plan.chunk_tokens);
    plan.c_kv = halves * static_cast<size_t>(a.rank);
    plan.k_pe = halves * static_cast<size_t>(a.rope);
    plan.keys = halves * static_cast<size_t>(a.heads * a.nope);
    plan.values = halves * static_cast<size_t>(a.heads * a.v);
    plan.running = plan.chunks > 1 ? static_cast<size_t>(blocks * steps_bytes) : 0;
    return plan;
}

size_t most_expanded_bytes(const mla_cuda_attention& a) {
    const auto most = [](int64_t one, int64_t all) {
        const int64_t affordable = one > kMaxChunkBytes ? one : kMaxChunkBytes;
        return static_cast<size_t>(all < affordable ? all : affordable);
    };
    const Shape shape = shape_of(a);
    const int64_t token = a.batch * token_bytes(a), block = a.batch * a.heads * shape.state_bytes;
    const int64_t blocks = (a.steps + shape.rows - 1) / shape.rows;
    return most(kExpandTokens * token, table_tokens(a) * token) + most(block, blocks * block);
}

mla_cuda_status attend_expanded(const mla_cuda_attention& a, const ExpandedPlan& plan, Params p,
                                Stream stream) {
    uint8_t* at = static_cast<uint8_t*>(a.workspace);
    const auto take = [&at](size_t bytes) {
        uint8_t* taken = at;
        at += bytes;
        return reinterpret_cast<uint16_t*>(taken);
    };
    p.c_kv = take(plan.c_kv);
    p.k_pe = take(plan.k_pe);
    p.keys = take(plan.keys);
    p.values = take(plan.values);
    p.running = reinterpret_cast<float*>(take(plan.running));
    p.chunk_tokens = static_cast<int>(plan.chunk_tokens);
    for (int64_t first = 0; first < a.steps; first += plan.round_steps) {
        const int64_t left = a.steps - first;
        p.first_step = static_cast<int>(first);
        p.round_steps = static_cast<int>(left < plan.round_steps ? left : plan.round_steps);
        for (int64_t chunk = 0; chunk < plan.chunks; ++chunk) {
            p.first_token = static_cast<int>(chunk * plan.chunk_tokens);
            MLA_TRY(launch_chunk(a, p, stream));
        }
    }
    return MLA_CUDA_OK;
}

}  // namespace mla::cuda
