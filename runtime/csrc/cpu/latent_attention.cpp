// The public calls: checks, then the modes.
#include "cpu/latent_attention.h"

#include <cmath>
#include <cstring>
#include <new>

#include "cpu/call.h"
#include "cpu/error.h"

namespace mla::cpu {
namespace {

constexpr int kEncodeTokens = 8;  // a task
constexpr int64_t kMaxBatch = 4096;

Status check_dims(int rank, int rope) {
    if (rank < 16 || rank > 1024 || rank % 16)
        return fail(Status::kBadArgument,
                    "kv_lora_rank is %d; allowed: a multiple of 16, 16 to 1024", rank);
    if (rope < 4 || rope > 128 || rope % 4)
        return fail(Status::kBadArgument,
                    "qk_rope_head_dim is %d; allowed: a multiple of 4, 4 to 128", rope);
    return Status::kOk;
}

Status check_sequences(const LatentAttentionParams& p) {
    if (p.batch < 0 || p.steps < 0 || p.table_pages < 0 || p.batch > kMaxBatch)
        return fail(Status::kBadArgument,
                    "batch %lld, steps %lld, table_pages %lld; allowed: batch 0 to %lld, "
                    "none negative",
                    static_cast<long long>(p.batch), static_cast<long long>(p.steps),
                    static_cast<long long>(p.table_pages), static_cast<long long>(kMaxBatch));
    if (p.batch == 0) return Status::kOk;
    if (!p.past_lengths || !p.new_lengths || (p.table_pages && !p.block_table))
        return fail(Status::kBadArgument, "past_lengths, new_lengths or block_table is null");
    for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t past = p.past_lengths[b], fresh = p.new_lengths[b];
        if (fresh < 0 || fresh > p.steps)
            return fail(Status::kBadArgument,
                        "new_lengths[%lld] is %lld; allowed: 0 to steps = %lld",
                        static_cast<long long>(b), static_cast<long long>(fresh),
                        static_cast<long long>(p.steps));
        if (past < 0 || past > p.table_pages * kPageTokens - fresh)
            return fail(Status::kBadArgument,
                        "sequence %lld holds %lld tokens and gets %lld; its row of the block "
                        "table has %lld pages, %lld tokens: give it more pages",
                        static_cast<long long>(b), static_cast<long long>(past),
                        static_cast<long long>(fresh), static_cast<long long>(p.table_pages),
                        static_cast<long long>(p.table_pages * kPageTokens));
        const int64_t used = (past + fresh + kPageTokens - 1) / kPageTokens;
        for (int64_t m = 0; m < used; ++m) {
            const int64_t page = p.block_table[b * p.table_pages + m];
            if (page < 0 || page >= p.cache.pages)
                return fail(Status::kBadArgument,
                            "block_table[%lld][%lld] is page %lld; the arena has %lld pages",
                            static_cast<long long>(b), static_cast<long long>(m),
                            static_cast<long long>(page), static_cast<long long>(p.cache.pages));
        }
    }
    return Status::kOk;
}

Status check_pointers(const LatentAttentionParams& p, bool attend) {
    if (p.batch == 0 || p.steps == 0) return Status::kOk;
    if (!p.kv || !p.cos || !p.sin) return fail(Status::kBadArgument, "kv, cos or sin is null");
    if (attend && (!p.q || !p.output)) return fail(Status::kBadArgument, "q or output is null");
    if (attend && !p.workspace)
        return fail(Status::kBadArgument, "workspace is null; make one with create_workspace()");
    if (attend && !(std::isfinite(p.softmax_scale) && p.softmax_scale > 0))
        return fail(Status::kBadArgument, "softmax_scale is %g; allowed: finite and above 0",
                    static_cast<double>(p.softmax_scale));
    return Status::kOk;
}

Status make_record(const CacheArena& cache, int rank, int rope, Record* record) {
    PartInfo parts[kMaxParts];
    int count = 0;
    if (const Status s = cache_parts(cache.format, rank, rope, parts, &count); s != Status::kOk)
        return s;
    *record = {};
    record->format = cache.format;
    record->rank = rank;
    record->group = group_size(rank, 64);
    record->groups = rank / record->group;
    record->rope = rope;
    record->rope_group = group_size(rope, 16);
    record->rope_groups = rope / record->rope_group;
    for (int p = 0; p < count; ++p) {
        if (!cache.parts[p] && cache.pages > 0)
            return fail(Status::kBadArgument, "cache part %d (%s) is null", p, parts[p].name);
        record->parts[p] = static_cast<uint8_t*>(cache.parts[p]);
        record->page_bytes[p] = parts[p].page_bytes;
    }
    return Status::kOk;
}

Status set_stride(const char* name, int64_t given, int64_t dense, int64_t* stride) {
    *stride = given ? given : dense;
    if (*stride < dense)
        return fail(Status::kBadArgument, "%s is %lld; allowed: 0 (dense) or at least %lld", name,
                    static_cast<long long>(given), static_cast<long long>(dense));
    return Status::kOk;
}

Status make_call(const LatentAttentionParams& p, bool attend, Call* call) {
    if (!p.weights) return fail(Status::kBadArgument, "weights is null; see prepare_weights()");
    call->params = &p;
    call->dims = p.weights->dims;
    const AttentionDims& d = call->dims;
    const int mode = static_cast<int>(p.mode);
    if (mode < 0 || mode > 2)
        return fail(Status::kBadArgument, "unknown attention mode %d; allowed: 0 to 2", mode);
    if (p.cache.pages < 0)
        return fail(Status::kBadArgument, "the cache has %lld pages; allowed: 0 or more",
                    static_cast<long long>(p.cache.pages));
    Status s = check_sequences(p);
    if (s == Status::kOk) s = check_pointers(p, attend);
    if (s == Status::kOk) s = make_record(p.cache, d.rank, d.rope, &call->record);
    const int64_t heads = d.heads;
    if (s == Status::kOk)
        s = set_stride("q_stride", p.q_stride, heads * (d.nope + d.rope), &call->q_stride);
    if (s == Status::kOk)
        s = set_stride("kv_stride", p.kv_stride, d.rank + d.rope, &call->kv_stride);
    if (s == Status::kOk)
        s = set_stride("output_stride", p.output_stride, heads * d.v, &call->output_stride);
    Isa isa = Isa::kAuto;
    if (s == Status::kOk) s = resolve_isa(p.isa, &isa);
    if (s == Status::kOk) call->kernels = kernels_of(isa);
    return s;
}

void clear_padding(const Call& call) {
    const LatentAttentionParams& p = *call.params;
    const size_t bytes = sizeof(float) * call.dims.heads * static_cast<size_t>(call.dims.v);
    for (int64_t b = 0; b < p.batch; ++b)
        for (int64_t s = p.new_lengths[b]; s < p.steps; ++s)
            std::memset(call.output(b, s, 0), 0, bytes);
}

}  // namespace

Status cache_parts(CacheFormat format, int rank, int rope, PartInfo* parts, int* count) {
    if (!parts || !count) return fail(Status::kBadArgument, "cache_parts: a null pointer");
    if (const Status s = check_dims(rank, rope); s != Status::kOk) return s;
    const int groups = rank / group_size(rank, 64), rope_groups = rope / group_size(rope, 16);
    *count = 0;
    const auto add = [&](const char* name, int element_bytes, int width) {
        PartInfo& part = parts[(*count)++];
        part.name = name;
        part.element_bytes = element_bytes;
        part.width = width;
        part.page_bytes = static_cast<int64_t>(element_bytes) * width * kPageTokens;
    };
    switch (format) {
        case CacheFormat::kInt4:
            add("codes", 1, rank / 2);
            add("scale", 2, groups);
            add("zero", 2, groups);
            break;
        case CacheFormat::kInt8:
            add("codes", 1, rank);
            add("scale", 2, groups);
            break;
        case CacheFormat::kFp16:
        case CacheFormat::kFp32: {
            const int bytes = format == CacheFormat::kFp16 ? 2 : 4;
            add("c_kv", bytes, rank);
            add("k_pe", bytes, rope);
            return Status::kOk;
        }
        default:
            return fail(Status::kBadArgument, "unknown cache format %d; allowed: 0 to 3",
                        static_cast<int>(format));
    }
    add("k_pe_codes", 1, rope);
    add("k_pe_scale", 2, rope_groups);
    return Status::kOk;
}

Workspace* create_workspace() { return new (std::nothrow) Workspace(); }

void free_workspace(Workspace* workspace) {
    if (!workspace) return;
    std::free(workspace->memory);
    delete workspace;
}

size_t workspace_bytes(const Workspace* workspace) { return workspace ? workspace->capacity : 0; }

AttentionMode choose_mode(const AttentionDims& d, Isa resolved, bool exact, int64_t past,
                          int64_t fresh, AttentionMode asked) {
    if (asked != AttentionMode::kAuto) return asked;
    const KernelTable* kernels = kernels_of(resolved);
    if (!kernels || fresh < 8) return AttentionMode::kAbsorbed;
    // Multiply-adds a head. A query sees the past and on average half of the new tokens. The
    // absorbed mode's two projections run in fp32.
    const double tokens = static_cast<double>(past + fresh);
    const double pairs = static_cast<double>(fresh) * (past + 0.5 * fresh);
    const double projections = static_cast<double>(fresh) * d.rank * (d.nope + d.v);
    const double rebuilding = tokens * d.rank * (d.nope + d.v);
    const float absorbed_rate = exact ? kernels->absorbed_exact_rate : kernels->absorbed_rate;
    const float expanded_rate = exact ? kernels->expanded_exact_rate : kernels->expanded_rate;
    const double absorbed = pairs * (2.0 * d.rank + d.rope) / absorbed_rate +
                            projections / kernels->expanded_exact_rate;
    const double expanded = (rebuilding + pairs * (d.nope + d.rope + d.v)) / expanded_rate;
    return absorbed <= expanded ? AttentionMode::kAbsorbed : AttentionMode::kExpanded;
}

int64_t encode_task_count(const Call& call) {
    const int64_t per_sequence = (call.params->steps + kEncodeTokens - 1) / kEncodeTokens;
    return per_sequence * call.params->batch;
}

void run_encode_task(const Call& call, int64_t index) {
    const LatentAttentionParams& p = *call.params;
    const int64_t per_sequence = (p.steps + kEncodeTokens - 1) / kEncodeTokens;
    const int64_t b = index / per_sequence, first = index % per_sequence * kEncodeTokens;
    const int64_t left = p.new_lengths[b] - first;
    if (left <= 0) return;
    EncodeTask task = {};
    task.record = &call.record;
    task.kv = p.kv + (b * p.steps + first) * call.kv_stride;
    task.kv_stride = call.kv_stride;
    task.cos = call.cos(b, first);
    task.sin = call.sin(b, first);
    task.tokens = static_cast<int>(left < kEncodeTokens ? left : kEncodeTokens);
    task.pages = call.pages(b);
    task.position = p.past_lengths[b] + first;
    task.epsilon = p.latent_norm_epsilon;
    call.kernels->encode(task);
}

Status latent_append(const LatentAttentionParams& params) {
    Call call = {};
    if (const Status s = make_call(params, false, &call); s != Status::kOk) return s;
    parallel_for(params.parallel, encode_task_count(call),
                 [&](int64_t i) { run_encode_task(call, i); });
    return Status::kOk;
}

Status latent_attention(const LatentAttentionParams& params) {
    Call call = {};
    if (const Status s = make_call(params, true, &call); s != Status::kOk) return s;
    Isa isa = Isa::kAuto;
    if (const Status s = resolve_isa(params.isa, &isa); s != Status::kOk) return s;
    bool absorbed[kMaxBatch];
    bool any_absorbed = false, any_expanded = false;
    for (int64_t b = 0; b < params.batch; ++b) {
        absorbed[b] = choose_mode(call.dims, isa, params.weights->exact(), params.past_lengths[b],
                                  params.new_lengths[b], params.mode) == AttentionMode::kAbsorbed;
        if (params.new_lengths[b] > 0) (absorbed[b] ? any_absorbed : any_expanded) = true;
    }
    clear_padding(call);
    // The first mode to run encodes all new tokens, whosever they are.
    if (any_absorbed)
        if (const Status s = attend_absorbed(call, absorbed, true); s != Status::kOk) return s;
    if (!any_expanded) return Status::kOk;
    if (!any_absorbed)
        parallel_for(params.parallel, encode_task_count(call),
                     [&](int64_t i) { run_encode_task(call, i); });
    for (int64_t b = 0; b < params.batch; ++b)
        if (!absorbed[b] && params.new_lengths[b] > 0)
            if (const Status s = attend_expanded(call, b); s != Status::kOk) return s;
    return Status::kOk;
}

}  // namespace mla::cpu
