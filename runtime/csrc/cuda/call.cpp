#include "cuda/call.h"

#include <cmath>

#include "cuda/attend_launch.h"
#include "cuda/expanded_launch.h"

namespace mla::cuda {
namespace {

constexpr int64_t kMaxBatch = 4096;
constexpr int64_t kMaxSteps = 1 << 20;
constexpr int64_t kMaxTablePages = 1 << 24;  // 2^30 tokens: positions are ints

mla_cuda_status check_pointer(const char* name, const void* pointer, uintptr_t alignment) {
    MLA_EXPECT(pointer, "%s is null", name);
    MLA_EXPECT(reinterpret_cast<uintptr_t>(pointer) % alignment == 0,
               "%s is at %p; it must be aligned to %d bytes", name, pointer,
               static_cast<int>(alignment));
    return MLA_CUDA_OK;
}

mla_cuda_status set_reals(const char* name, const mla_cuda_reals& given, int64_t dense,
                          Reals* reals) {
    MLA_EXPECT(given.type >= MLA_CUDA_FP32 && given.type <= MLA_CUDA_BF16,
               "%s is of unknown type %d; allowed: fp32 (0), fp16 (1), bf16 (2)", name,
               static_cast<int>(given.type));
    MLA_EXPECT(given.stride == 0 || given.stride >= dense,
               "the stride of %s is %lld; allowed: 0 (dense) or at least %lld", name,
               static_cast<long long>(given.stride), static_cast<long long>(dense));
    *reals = {given.data, static_cast<Element>(given.type), given.stride ? given.stride : dense};
    return check_pointer(name, given.data, given.type == MLA_CUDA_FP32 ? 4 : 2);
}

}  // namespace

mla_cuda_status check_sizes(const mla_cuda_attention& a) {
    MLA_EXPECT(a.size == sizeof a,
               "size is %zu; this library wants %zu: set it to "
               "sizeof(mla_cuda_attention), and compile against its own header",
               a.size, sizeof a);
    MLA_EXPECT(a.heads >= 1 && a.heads <= 128, "heads is %d; allowed: 1 to 128", a.heads);
    MLA_EXPECT(a.nope >= 8 && a.nope <= 1024 && a.nope % 8 == 0,
               "qk_nope_head_dim is %d; allowed: a multiple of 8, 8 to 1024", a.nope);
    MLA_EXPECT(a.rank == 256 || a.rank == 512, "kv_lora_rank is %d; allowed: 256 or 512", a.rank);
    MLA_EXPECT(a.rope >= 16 && a.rope <= 64 && a.rope % 16 == 0,
               "qk_rope_head_dim is %d; allowed: 16, 32, 48 or 64", a.rope);
    MLA_EXPECT(a.v >= 8 && a.v <= 1024 && a.v % 8 == 0,
               "v_head_dim is %d; allowed: a multiple of 8, 8 to 1024", a.v);
    MLA_EXPECT(a.batch >= 0 && a.batch <= kMaxBatch, "batch is %lld; allowed: 0 to %lld",
               static_cast<long long>(a.batch), static_cast<long long>(kMaxBatch));
    MLA_EXPECT(a.steps >= 0 && a.steps <= kMaxSteps, "steps is %lld; allowed: 0 to %lld",
               static_cast<long long>(a.steps), static_cast<long long>(kMaxSteps));
    MLA_EXPECT(a.table_pages >= 0 && a.table_pages <= kMaxTablePages,
               "table_pages is %lld; allowed: 0 to %lld", static_cast<long long>(a.table_pages),
               static_cast<long long>(kMaxTablePages));
    MLA_EXPECT(a.pages >= 1, "the cache has %lld pages; allowed: 1 or more",
               static_cast<long long>(a.pages));
    MLA_EXPECT(a.cache_format >= MLA_CUDA_CACHE_INT4 && a.cache_format <= MLA_CUDA_CACHE_FP16,
               "unknown cache format %d; allowed: int4 (0), int8 (1), fp16 (2)",
               static_cast<int>(a.cache_format));
    MLA_EXPECT(a.splits >= 0 && a.splits <= kMaxSplits,
               "splits is %d; allowed: 0 (automatic) to %d", a.splits,
               static_cast<int>(kMaxSplits));
    MLA_EXPECT(a.mode >= MLA_CUDA_AUTO && a.mode <= MLA_CUDA_EXPANDED,
               "unknown mode %d; allowed: auto (0), absorbed (1), expanded (2)",
               static_cast<int>(a.mode));
    MLA_EXPECT(a.mode != MLA_CUDA_EXPANDED || can_expand(a),
               "mode is expanded, with heads of %d + %d and %d channels; allowed: up to 256 each; "
               "let mode be auto (0)",
               a.nope, a.rope, a.v);
    return MLA_CUDA_OK;
}

mla_cuda_status fill_append(const mla_cuda_attention& a, Params* p) {
    p->batch = static_cast<int>(a.batch);
    p->steps = static_cast<int>(a.steps);
    p->table_pages = static_cast<int>(a.table_pages);
    p->heads = a.heads;
    p->nope = a.nope;
    p->rank = a.rank;
    p->rope = a.rope;
    p->v = a.v;
    p->norm_epsilon = a.latent_norm_epsilon;
    MLA_TRY(set_reals("kv", a.kv, int64_t{a.rank} + a.rope, &p->kv));
    MLA_TRY(check_pointer("cos", a.cos, 4));
    MLA_TRY(check_pointer("sin", a.sin, 4));
    MLA_TRY(check_pointer("block_table", a.block_table, 8));
    MLA_TRY(check_pointer("past_lengths", a.past_lengths, 8));
    MLA_TRY(check_pointer("new_lengths", a.new_lengths, 8));
    p->cos = a.cos;
    p->sin = a.sin;
    p->block_table = a.block_table;
    p->past_lengths = a.past_lengths;
    p->new_lengths = a.new_lengths;
    for (int i = 0; i < family_of(static_cast<CacheFormat>(a.cache_format)).parts; ++i) {
        MLA_TRY(check_pointer("a part of the cache", a.cache[i], 16));
        p->parts[i] = static_cast<uint8_t*>(a.cache[i]);
    }
    p->pages = a.pages;
    if (a.problem) MLA_TRY(check_pointer("problem", a.problem, 4));
    p->problem = a.problem;
    return MLA_CUDA_OK;
}

mla_cuda_status fill_attention(const mla_cuda_attention& a, Params* p) {
    MLA_TRY(fill_append(a, p));
    MLA_TRY(set_reals("q", a.q, int64_t{a.heads} * (a.nope + a.rope), &p->q));
    MLA_TRY(set_reals("output", a.output, int64_t{a.heads} * a.v, &p->output));
    MLA_TRY(check_pointer("w_uk", a.w_uk, 16));
    MLA_TRY(check_pointer("w_uv", a.w_uv, 16));
    MLA_EXPECT(std::isfinite(a.softmax_scale) && a.softmax_scale > 0,
               "softmax_scale is %g; allowed: finite and above 0",
               static_cast<double>(a.softmax_scale));
    p->w_uk = static_cast<const uint16_t*>(a.w_uk);
    p->w_uv = static_cast<const uint16_t*>(a.w_uv);
    p->query_scale = a.softmax_scale * 1.4426950408889634f;
    return check_pointer("workspace", a.workspace, 256);
}

mla_cuda_status check_workspace(const mla_cuda_attention& a, size_t needed) {
    MLA_EXPECT(a.workspace_bytes >= needed,
               "the workspace has %zu bytes; needed are %zu: ask mla_cuda_workspace_bytes()",
               a.workspace_bytes, needed);
    return MLA_CUDA_OK;
}

}  // namespace mla::cuda
