// The C calls: the cut into rounds and splits, launches.
#include "cuda/attend_launch.h"
#include "cuda/call.h"
#include "cuda/expanded_launch.h"
#include "cuda/merge.h"
#include "cuda/prepare.h"
#include "cuda/status.h"

namespace mla::cuda {
namespace {

constexpr int64_t kMaxPartialFloats = 64 << 20;

// ---- the cut ----------------------------------------------------------------------------------

struct Plan {
    int64_t round_steps;  // tokens of a sequence in a round
    int64_t rows;         // of a sequence
    int row_tiles;
    int64_t row_blocks;
    int splits, stages, shared_bytes;

    bool overlaps;  // launches

    // Words of each part of the workspace.
    size_t padded_rows(const mla_cuda_attention& a) const {
        return static_cast<size_t>(a.batch * row_blocks * row_tiles * kRowTile);
    }
    size_t queries(const mla_cuda_attention& a) const {
        return padded_rows(a) * static_cast<size_t>(a.rank + a.rope) / 2;
    }
    size_t partial_o(const mla_cuda_attention& a) const {
        return padded_rows(a) * static_cast<size_t>(splits) * static_cast<size_t>(a.rank);
    }
    size_t latents(const mla_cuda_attention& a) const {
        return static_cast<size_t>(a.batch * rows) * static_cast<size_t>(a.rank);
    }
    size_t partial(const mla_cuda_attention& a) const {
        return static_cast<size_t>(a.batch * rows) * static_cast<size_t>(splits) * 2;
    }
    size_t bytes(const mla_cuda_attention& a) const {
        return 4 * (queries(a) + partial_o(a) + latents(a) + partial(a));
    }
};

// Plans depend on sizes and the device only, never on lengths: a captured graph stays right as
// sequences grow.
bool is_expanded(const mla_cuda_attention& a, const Device& device) {
    return a.mode == MLA_CUDA_AUTO ? should_expand(a, device) : a.mode == MLA_CUDA_EXPANDED;
}

mla_cuda_status make_plan(const mla_cuda_attention& a, const Device& device, Plan* plan) {
    plan->overlaps = device.compute_capability >= 90;
    const int64_t token_rows = a.batch * a.heads;
    int64_t steps = device.round_rows / (token_rows ? token_rows : 1);
    if (steps < 1) steps = 1;
    plan->round_steps = steps < a.steps ? steps : a.steps;
    plan->rows = plan->round_steps * a.heads;
    plan->row_tiles = row_tiles_for(plan->rows);
    const AttendShape shape = family_of(static_cast<CacheFormat>(a.cache_format))
                                  .describe(a.rank, a.rope, plan->row_tiles);
    plan->row_blocks = (plan->rows + shape.rows - 1) / shape.rows;

    // As many stages as leave room for the blocks that registers allow, if two do.
    const auto shared = [&](int stages) { return shape.fixed_bytes + stages * shape.tile_bytes; };
    const int kReserved = 1 << 10;  // of each block, by the system
    plan->stages = kMinStages;
    int blocks = shape.blocks_wanted;
    while (blocks > 1 && blocks * (shared(kMinStages) + kReserved) > device.shared_bytes_all)
        --blocks;
    while (plan->stages < kMaxStages && shared(plan->stages + 1) <= device.shared_bytes &&
           blocks * (shared(plan->stages + 1) + kReserved) <= device.shared_bytes_all)
        ++plan->stages;
    plan->shared_bytes = shared(plan->stages);
    if (plan->shared_bytes > device.shared_bytes)
        return fail(MLA_CUDA_UNSUPPORTED,
                    "the kernel needs %d bytes of shared memory a block; the device has %d",
                    plan->shared_bytes, device.shared_bytes);

    int64_t splits = a.splits;
    if (splits == 0) {
        const int64_t others = plan->row_blocks * a.batch;
        splits = int64_t{device.multiprocessors} * blocks / (others ? others : 1);
        const int64_t tiles = a.table_pages * (kPageTokens / shape.tile_tokens);
        if (splits > tiles / 2) splits = tiles / 2;  // a run of one tile is mostly overhead
        const int64_t row_floats = a.batch * plan->row_blocks * shape.rows * a.rank;
        if (row_floats && splits > kMaxPartialFloats / row_floats)
            splits = kMaxPartialFloats / row_floats;
        if (splits > kMaxSplits) splits = kMaxSplits;
        if (splits < 1) splits = 1;
    }
    plan->splits = static_cast<int>(splits);
    return MLA_CUDA_OK;
}

// What a plan takes at most, of these sizes and of smaller ones, on any device: rows and their
// splits are bounded as above, with every limit of a device at its largest.
size_t most_absorbed_bytes(const mla_cuda_attention& a) {
    const int64_t token_rows = a.batch * a.heads;
    const int64_t in_a_round = token_rows > kMaxRoundRows ? token_rows : kMaxRoundRows;
    const int64_t all_rows = token_rows * a.steps;
    const int64_t rows = all_rows < in_a_round ? all_rows : in_a_round;
    const AttendFamily& family = family_of(static_cast<CacheFormat>(a.cache_format));
    int64_t at_once = 0, tile_tokens = kPageTokens, padding = 0;
    for (int row_tiles = 1; row_tiles <= 2; ++row_tiles) {
        const AttendShape shape = family.describe(a.rank, a.rope, row_tiles);
        const int64_t held = int64_t{kMaxMultiprocessors} * shape.blocks_wanted * shape.rows;
        if (held > at_once) at_once = held;
        if (a.batch * shape.rows > padding) padding = a.batch * shape.rows;
        if (shape.tile_tokens < tile_tokens) tile_tokens = shape.tile_tokens;
    }
    int64_t splits = a.table_pages * (kPageTokens / tile_tokens) / 2;
    if (splits > kMaxSplits) splits = kMaxSplits;
    if (splits < 1) splits = 1;
    const int64_t padded = rows + padding;
    const int64_t enough = at_once > padded ? at_once : padded;
    const int64_t split_rows = padded * splits < enough ? padded * splits : enough;
    return 4 * static_cast<size_t>(padded * (a.rank + a.rope) / 2 + rows * a.rank +
                                   split_rows * (a.rank + 2));
}

mla_cuda_status needed_bytes(const mla_cuda_attention& a, const Device& device, size_t* bytes) {
    if (is_expanded(a, device)) {
        *bytes = plan_expanded(a, device).bytes();
        return MLA_CUDA_OK;
    }
    Plan plan = {};
    MLA_TRY(make_plan(a, device, &plan));
    *bytes = plan.bytes(a);
    return MLA_CUDA_OK;
}

size_t most_bytes(const mla_cuda_attention& a) {
    const size_t absorbed = a.mode == MLA_CUDA_EXPANDED ? 0 : most_absorbed_bytes(a);
    const size_t expanded =
        a.mode == MLA_CUDA_ABSORBED || !can_expand(a) ? 0 : most_expanded_bytes(a);
    return absorbed > expanded ? absorbed : expanded;
}

// ---- launches ---------------------------------------------------------------------------------

// Grids are one-dimensional, so that `tokens` of a round are few or many alike.
template <CacheFormat format, int Tiles>
mla_cuda_status launch_prepare(const Params& p, bool with_queries, Stream stream) {
    using Kernel = Prepare<format, Tiles>;
    const int64_t queries = with_queries ? Kernel::Matmul::Queries::blocks(p) : 0;
    const Grid grid = {Kernel::append_blocks(p) + queries, 1, 1};
    MLA_LAUNCH(launch<Kernel>(p, grid, Kernel::kSharedBytes, stream));
    return MLA_CUDA_OK;
}

template <int Tiles>
mla_cuda_status launch_prepare(const Params& p, CacheFormat format, bool with_queries,
                               Stream stream) {
    return format == CacheFormat::kInt4
               ? launch_prepare<CacheFormat::kInt4, Tiles>(p, with_queries, stream)
           : format == CacheFormat::kInt8
               ? launch_prepare<CacheFormat::kInt8, Tiles>(p, with_queries, stream)
               : launch_prepare<CacheFormat::kFp16, Tiles>(p, with_queries, stream);
}

template <int Tiles>
mla_cuda_status launch_outputs(const Params& p, Stream stream) {
    using Matmul = HeadMatmul<Tiles>;
    const int64_t tokens = int64_t{p.batch} * p.round_steps;
    const Grid grid = {(p.v + Matmul::kColumns - 1) / Matmul::kColumns, p.heads,
                       (tokens + Matmul::kTokens - 1) / Matmul::kTokens};
    MLA_LAUNCH(launch<typename Matmul::Outputs>(p, grid, Matmul::kSharedBytes, stream));
    return MLA_CUDA_OK;
}

template <int Tiles>
mla_cuda_status launch_round(const Params& p, const Plan& plan, CacheFormat format, Stream stream) {
    MLA_TRY(launch_prepare<Tiles>(p, format, true, stream));
    const Grid grid = {p.splits, plan.row_blocks, p.batch};
    MLA_LAUNCH(family_of(format).launch(p, plan.row_tiles, grid, plan.shared_bytes, stream));
    const Grid merging = {Merge::blocks(p.rank, p.splits), p.row_tiles, p.batch};
    MLA_LAUNCH(launch<Merge>(p, merging, Merge::kSharedBytes, stream));
    return launch_outputs<Tiles>(p, stream);
}

mla_cuda_status launch_append(Params p, CacheFormat format, Stream stream) {
    p.round_steps = p.steps;
    return launch_prepare<1>(p, format, false, stream);
}

mla_cuda_status append(const mla_cuda_attention& a, Stream stream) {
    MLA_TRY(check_sizes(a));
    if (a.batch == 0 || a.steps == 0) return MLA_CUDA_OK;
    Params p = {};
    MLA_TRY(fill_append(a, &p));
    return launch_append(p, static_cast<CacheFormat>(a.cache_format), stream);
}

mla_cuda_status attend_absorbed(const mla_cuda_attention& a, const Plan& plan, Params p,
                                Stream stream) {
    p.splits = plan.splits;
    p.stages = plan.stages;
    p.row_tiles = static_cast<int>(plan.row_blocks * plan.row_tiles);
    p.overlaps = plan.overlaps;
    p.queries = static_cast<uint32_t*>(a.workspace);
    p.partial_o = reinterpret_cast<float*>(p.queries + plan.queries(a));
    p.latents = p.partial_o + plan.partial_o(a);
    p.partial = p.latents + plan.latents(a);

    const CacheFormat format = static_cast<CacheFormat>(a.cache_format);
    p.folded = format == CacheFormat::kInt4;
    for (int64_t first = 0; first < a.steps; first += plan.round_steps) {
        const int64_t left = a.steps - first;
        p.first_step = static_cast<int>(first);
        p.round_steps = static_cast<int>(left < plan.round_steps ? left : plan.round_steps);
        // Weights of the projections are read once for 16 or 32 tokens.
        MLA_TRY(int64_t{p.batch} * p.round_steps <= kRowTile
                    ? launch_round<1>(p, plan, format, stream)
                    : launch_round<2>(p, plan, format, stream));
    }
    return MLA_CUDA_OK;
}

mla_cuda_status attend(const mla_cuda_attention& a, Stream stream) {
    MLA_TRY(check_sizes(a));
    if (a.batch == 0 || a.steps == 0) return MLA_CUDA_OK;
    Params p = {};
    MLA_TRY(fill_attention(a, &p));
    Device device = {};
    MLA_LAUNCH(current_device(&device));
    if (is_expanded(a, device)) {
        const ExpandedPlan plan = plan_expanded(a, device);
        MLA_TRY(check_workspace(a, plan.bytes()));
        MLA_TRY(launch_append(p, static_cast<CacheFormat>(a.cache_format), stream));
        return attend_expanded(a, plan, p, stream);
    }
    Plan plan = {};
    MLA_TRY(make_plan(a, device, &plan));
    MLA_TRY(check_workspace(a, plan.bytes(a)));
    return attend_absorbed(a, plan, p, stream);
}

}  // namespace
}  // namespace mla::cuda

extern "C" {

mla_cuda_status mla_cuda_check_device(void) {
    using namespace mla::cuda;
    Device device = {};
    if (const Failure failure = current_device(&device)) return fail_launch(failure);
    if (const Failure failure = probe<Merge>()) return fail_launch(failure);
    return MLA_CUDA_OK;
}

mla_cuda_status mla_cuda_workspace_bytes(const mla_cuda_attention* attention, size_t* bytes) {
    using namespace mla::cuda;
    MLA_EXPECT(attention && bytes, "mla_cuda_workspace_bytes: a null pointer");
    MLA_TRY(check_sizes(*attention));
    Device device = {};
    MLA_LAUNCH(current_device(&device));
    return needed_bytes(*attention, device, bytes);
}

mla_cuda_status mla_cuda_workspace_bound(const mla_cuda_attention* attention, size_t* bytes) {
    using namespace mla::cuda;
    MLA_EXPECT(attention && bytes, "mla_cuda_workspace_bound: a null pointer");
    MLA_TRY(check_sizes(*attention));
    *bytes = most_bytes(*attention);
    return MLA_CUDA_OK;
}

mla_cuda_status mla_cuda_cache_parts(const mla_cuda_attention* attention, mla_cuda_part parts[5],
                                     int32_t* count) {
    using namespace mla::cuda;
    MLA_EXPECT(attention && parts && count, "mla_cuda_cache_parts: a null pointer");
    MLA_TRY(check_sizes(*attention));
    const AttendFamily& family = family_of(static_cast<CacheFormat>(attention->cache_format));
    *count = family.parts;
    for (int32_t i = 0; i < *count; ++i) {
        const Part part = family.part(i, attention->rank, attention->rope);
        parts[i] = {part.element_bytes, part.page_bytes()};
    }
    return MLA_CUDA_OK;
}

mla_cuda_status mla_cuda_latent_append(const mla_cuda_attention* attention, void* stream) {
    using namespace mla::cuda;
    MLA_EXPECT(attention, "mla_cuda_latent_append: a null pointer");
    return append(*attention, stream);
}

mla_cuda_status mla_cuda_latent_attention(const mla_cuda_attention* attention, void* stream) {
    using namespace mla::cuda;
    MLA_EXPECT(attention, "mla_cuda_latent_attention: a null pointer");
    return attend(*attention, stream);
}

}  // extern "C"
