// Attention of a block of rows to a run of tiles of one sequence: the absorbed mode, in which keys
// are the latents and the rotated key, and values the latents again.
//
// A block has one warp for each 64 latent channels (8 at rank 512) and 16 or 32 rows, that is heads
// of one token or of several. The cache is read once for all of them. For each tile:
//
//     copies    the tile, stages ahead of its use
//     scores    warp (quarter, run): a quarter of the channels, some tokens; queries in registers
//     softmax   16 threads a row: sums the quarters, masks, exponentials, probabilities in half
//     values    a warp: all tokens, its own 64 channels; sums in registers
//
// Values of a tile and scores of the next are between the same two barriers, so that warps have
// something to do while others wait for memory.
//
// Where a record is folded (formats.h), with c = scale * code + zero,
//
//     score = sum_g scale_g (q . codes)_g + sum_g zero_g (sum q)_g    scales on a lane's few sums
//     value = sum_t (p scale)_t codes_t + sum_t p_t zero_t            p scale in half
//
// A row's maximum is raised only when exceeded by 2^kSlack, so that sums are rarely rescaled; p is
// then at most 2^kSlack, which leaves (p scale) in half's range. What is left at the end are sums
// relative to a maximum; merge.h joins the runs of tiles.
#pragma once

#include <type_traits>

#include "cuda/fragments.h"
#include "cuda/sequence.h"

namespace mla::cuda {

constexpr float kSlack = 3;
constexpr int kRowThreads = 16;  // of the softmax
constexpr int kMaxRope = 64;

// Rope: qk_rope_head_dim where it is known when compiling, else 0.
template <class Format, int Rank, int RowTiles, int Rope>
struct Attend {
    static MLA_DEVICE int rope_of(const Params& p) { return Rope ? Rope : p.rope; }

    static constexpr int kTile = Format::kTile;
    static constexpr int kRows = 16 * RowTiles;
    static constexpr int kWarps = Rank / kGroup;
    static constexpr int kThreads = kWarps * kWarpLanes;
    static constexpr int kMinBlocks = 16 / kWarps / RowTiles;  // an SM: what registers must allow

    static constexpr int kQuarters = 4;
    static constexpr int kRuns = kWarps / kQuarters;
    static constexpr int kScoreTiles = kTile / 8 / kRuns;  // of 8 tokens, a warp
    static constexpr int kGroups = Rank / kGroup;
    static constexpr int kQuarterGroups = kGroups / kQuarters;
    static constexpr int kPasses = kRows * kRowThreads / kThreads;  // of the softmax
    static constexpr int kThreadTokens = kTile / kRowThreads;
    // Of the loops over a tile; more would take registers that there are not.
    static constexpr int kUnroll = Rope ? 4 : 2;

    static_assert(kGroups <= 8 && kScoreTiles % kQuarters == 0 || !Format::kFolded,
                  "sums of all groups are one operand, and the quarters take turns");
    // A thread's scores and probabilities, each read or written at once.
    static_assert(kThreadTokens == 2 || kThreadTokens == 4, "a vector of floats");
    using ThreadScores = std::conditional_t<kThreadTokens == 4, Floats4, Floats2>;
    using ThreadProbs = std::conditional_t<kThreadTokens == 4, Words2, Words1>;

    // Rows of scores and probabilities are padded so that their reads and writes spread over banks.
    static constexpr int kScoreStride = kTile + 8;  // floats
    static constexpr int kProbStride = kTile + 16;  // halves

    static MLA_CONSTEXPR int tile_bytes(int rope) {
        int bytes = 0;
        for (int i = 0; i < Format::kParts; ++i)
            bytes += TilePart<kTile>::bytes(Format::part(i, Rank, rope));
        return bytes;
    }

    // Shared memory: scores [quarter][row][token] float, probabilities [row][token] half,
    // alpha [row] float, then the tiles.
    static constexpr int kScoreBytes = kQuarters * kRows * kScoreStride * 4;
    static constexpr int kProbBytes = kRows * kProbStride * 2;
    static constexpr int kFixedBytes = kScoreBytes + kProbBytes + kRows * 4;

    static MLA_CONSTEXPR int shared_bytes(int rope, int stages) {
        return kFixedBytes + tile_bytes(rope) * stages;
    }

    // What one thread keeps. Arrays are indexed by constants only, so that they are registers.
    struct State {
        uint32_t q[kQuarterGroups][kGroupSteps][RowTiles][4];
        uint32_t q_pe[RowTiles][4];
        uint32_t q_sum[RowTiles][4];  // folded: of each group of channels, see load_sums()
        float o[RowTiles][kGroupTiles][4];
        float o_zero[RowTiles][4];  // folded: the zeros' share, the same in all columns
        float max[kPasses], sum[kPasses];
        int visible[kPasses];  // tokens that the row sees
    };

    // ---- rows -------------------------------------------------------------------------------

    struct Rows {
        int begin, count;  // this block's, in the sequence
        int first;         // the first one, in all sequences
        int tile;          // its row tile, in the sequence
    };

    // Sums of a row's query over each group of channels, until there are probabilities.
    static MLA_DEVICE float* query_sums(const Thread& thread, int row) {
        return reinterpret_cast<float*>(thread.shared + kScoreBytes) + row * kGroups;
    }

    // As an operand: columns 0 to 7 hold what half takes of the sums of groups 0 to 7, columns 8 to
    // 15 what it leaves of them, so that they are as exact as in float.
    static MLA_DEVICE void load_sums(const Thread& thread, State& state) {
        const int group = thread.lane() / 4, quad = thread.lane() % 4;
        MLA_UNROLL
        for (int r = 0; r < RowTiles; ++r) {
            MLA_UNROLL
            for (int i = 0; i < 2; ++i) {
                Floats2 sums = {0, 0};
                if (2 * quad < kGroups)
                    sums = load<Floats2>(query_sums(thread, 16 * r + 8 * i + group) + 2 * quad);
                const uint32_t rounded = pack_half2(in_range(sums.x), in_range(sums.y));
                const Floats2 taken = unpack_half2(rounded);
                state.q_sum[r][i] = rounded;
                state.q_sum[r][2 + i] =
                    pack_half2(in_range(sums.x - taken.x), in_range(sums.y - taken.y));
            }
        }
    }

    static MLA_DEVICE void start_rows(const Params& p, const Sequence& sequence, const Rows& rows,
                                      const Thread& thread, State& state) {
        MLA_UNROLL
        for (int pass = 0; pass < kPasses; ++pass) {
            const int row = pass * (kThreads / kRowThreads) + thread.index / kRowThreads;
            state.max[pass] = kNothingSeen;
            state.sum[pass] = 0;
            const int step = p.first_step + (rows.begin + row) / p.heads;
            state.visible[pass] = row < rows.count ? sequence.past + step + 1 : 0;
        }
        const int group = thread.lane() / 4, quad = thread.lane() % 4;
        const int quarter = thread.warp() % kQuarters;
        const auto read = [&](int r, int step, uint32_t (&a)[4]) {
            const Words4 words = load<Words4>(
                query_fragment(p, thread.block_z, rows.tile + r, step) + thread.lane() * 4);
            a[0] = words.x;
            a[1] = words.y;
            a[2] = words.z;
            a[3] = words.w;
        };
        MLA_UNROLL
        for (int r = 0; r < RowTiles; ++r) {
            MLA_UNROLL
            for (int g = 0; g < kQuarterGroups; ++g) {
                MLA_UNROLL
                for (int step = 0; step < kGroupSteps; ++step)
                    read(r, (quarter * kQuarterGroups + g) * kGroupSteps + step,
                         state.q[g][step][r]);
            }
            if (quarter < rope_of(p) / kRopeGroup) read(r, Rank / 16 + quarter, state.q_pe[r]);
        }
        MLA_UNROLL
        for (int r = 0; r < RowTiles; ++r) {
            MLA_UNROLL
            for (int g = 0; g < kQuarterGroups; ++g) {
                float above = 0, below = 0;
                MLA_UNROLL
                for (int step = 0; step < kGroupSteps; ++step) {
                    const uint32_t (&a)[4] = state.q[g][step][r];
                    const float factor = Format::key_factor(step);
                    // Of queries as rounded, so that codes and zeros still cancel.
                    above += (half2_sum(a[0]) + half2_sum(a[2])) / factor;
                    below += (half2_sum(a[1]) + half2_sum(a[3])) / factor;
                }
                if constexpr (Format::kFolded) {
                    MLA_UNROLL
                    for (int mask = 1; mask < 4; mask *= 2) {
                        above += shuffle_xor(above, mask);
                        below += shuffle_xor(below, mask);
                    }
                    if (quad == 0 && thread.warp() < kQuarters) {  // two runs have the same
                        float* sums = query_sums(thread, 16 * r + group);
                        sums[quarter * kQuarterGroups + g] = above;
                        sums[8 * kGroups + quarter * kQuarterGroups + g] = below;
                    }
                }
            }
            MLA_UNROLL
            for (int j = 0; j < kGroupTiles; ++j) {
                MLA_UNROLL
                for (int i = 0; i < 4; ++i) state.o[r][j][i] = 0;
            }
            MLA_UNROLL
            for (int i = 0; i < 4; ++i) state.o_zero[r][i] = 0;
        }
    }

    // ---- a tile -----------------------------------------------------------------------------

    // Columns are few: other threads copy those of each part.
    template <int I>
    static MLA_DEVICE void start_copy(const Params& p, int page, int first, int valid,
                                      uint8_t* tile, int thread) {
        if constexpr (I < Format::kParts) {
            const Part part = Format::part(I, Rank, rope_of(p));
            TilePart<kTile>::template copy<kThreads, Format::part(I, Rank, kMaxRope).width>(
                part, p.parts[I] + int64_t{page} * part.page_bytes(), first, valid,
                part.layout == Layout::kColumns ? (thread + kThreads - 64 * I % kThreads) % kThreads
                                                : thread,
                tile);
            start_copy<I + 1>(p, page, first, valid, tile + TilePart<kTile>::bytes(part), thread);
        }
    }

    static MLA_DEVICE void start_copies(const Params& p, int page, int first, int valid,
                                        uint8_t* tile, int thread) {
        start_copy<0>(p, page, first, valid, tile, thread);
    }

    static MLA_DEVICE void find_parts(const uint8_t* tile, int rope,
                                      const uint8_t* (&at)[kMaxParts]) {
        MLA_UNROLL
        for (int i = 0; i < Format::kParts; ++i) {
            at[i] = tile;
            tile += TilePart<kTile>::bytes(Format::part(i, Rank, rope));
        }
    }

    static MLA_DEVICE void scores(const Params& p, const uint8_t* const (&at)[kMaxParts],
                                  const Thread& thread, const State& state) {
        float* out = reinterpret_cast<float*>(thread.shared);
        const int group = thread.lane() / 4, quad = thread.lane() % 4;
        const int quarter = thread.warp() % kQuarters, run = thread.warp() / kQuarters;
        MLA_UNROLL_BY(kUnroll)
        for (int i = 0; i < kScoreTiles / 2; ++i) {
            const int block = run * (kScoreTiles / 2) + i;
            MLA_UNROLL_BY(kUnroll)
            for (int odd = 0; odd < 2; ++odd) {
                const int slot = 8 * odd + group, first = kBlockTokens * block + 8 * odd;
                float sums[RowTiles][4] = {}, folded[RowTiles][4] = {};
                MLA_UNROLL
                for (int g = 0; g < kQuarterGroups; ++g) {
                    const int channels = quarter * kQuarterGroups + g;
                    uint32_t b[kGroupSteps][2];
                    Format::template keys<Rank>(at, channels, block, slot, quad, b);
                    if constexpr (Format::kFolded) {
                        const Floats2 scale =
                            unpack_half2(Format::scales(at, channels, first + 2 * quad));
                        MLA_UNROLL
                        for (int r = 0; r < RowTiles; ++r) {
                            float products[4] = {};
                            MLA_UNROLL
                            for (int step = 0; step < kGroupSteps; ++step)
                                mma(products, state.q[g][step][r], b[step][0], b[step][1]);
                            MLA_UNROLL
                            for (int k = 0; k < 4; ++k)
                                folded[r][k] += (k % 2 ? scale.y : scale.x) * products[k];
                        }
                    } else {
                        MLA_UNROLL
                        for (int step = 0; step < kGroupSteps; ++step) {
                            MLA_UNROLL
                            for (int r = 0; r < RowTiles; ++r)
                                mma(sums[r], state.q[g][step][r], b[step][0], b[step][1]);
                        }
                    }
                }
                if (quarter < rope_of(p) / kRopeGroup) {  // the same for a whole warp
                    uint32_t b[2];
                    Format::rope_keys(at, rope_of(p), quarter, block, slot, quad, b);
                    MLA_UNROLL
                    for (int r = 0; r < RowTiles; ++r) mma(sums[r], state.q_pe[r], b[0], b[1]);
                }
                if constexpr (Format::kFolded) {
                    // The zeros of all groups at once: the quarters do so in turn.
                    if ((2 * i + odd) % kQuarters == quarter) {
                        const uint32_t zeros =
                            Format::template zeros_of<kGroups>(at, first + group, quad);
                        MLA_UNROLL
                        for (int r = 0; r < RowTiles; ++r)
                            mma(sums[r], state.q_sum[r], zeros, zeros);
                    }
                    MLA_UNROLL
                    for (int r = 0; r < RowTiles; ++r) {
                        MLA_UNROLL
                        for (int k = 0; k < 4; ++k) sums[r][k] += Format::kUnit * folded[r][k];
                    }
                }
                MLA_UNROLL
                for (int r = 0; r < RowTiles; ++r) {
                    float* row = out + (quarter * kRows + 16 * r + group) * kScoreStride + first;
                    store<Floats2>(row + 2 * quad, {sums[r][0], sums[r][1]});
                    store<Floats2>(row + 8 * kScoreStride + 2 * quad, {sums[r][2], sums[r][3]});
                }
            }
        }
    }

    // first: the tile's first token in its sequence.
    static MLA_DEVICE void softmax(int first, const Thread& thread, State& state) {
        const float* scores = reinterpret_cast<const float*>(thread.shared);
        uint8_t* probabilities = thread.shared + kScoreBytes;
        float* alphas = reinterpret_cast<float*>(thread.shared + kScoreBytes + kProbBytes);
        const int at = thread.index % kRowThreads * kThreadTokens;
        MLA_UNROLL
        for (int pass = 0; pass < kPasses; ++pass) {
            const int row = pass * (kThreads / kRowThreads) + thread.index / kRowThreads;
            float s[kThreadTokens];
            MLA_UNROLL
            for (int quarter = 0; quarter < kQuarters; ++quarter) {
                const float* from = scores + (quarter * kRows + row) * kScoreStride + at;
                const auto some = load<ThreadScores>(from);
                s[0] = quarter ? s[0] + some.x : some.x;
                s[1] = quarter ? s[1] + some.y : some.y;
                if constexpr (kThreadTokens == 4) {
                    s[2] = quarter ? s[2] + some.z : some.z;
                    s[3] = quarter ? s[3] + some.w : some.w;
                }
            }
            const int seen = state.visible[pass] - first - at;  // of this thread's tokens
            float top = kNothingSeen;
            MLA_UNROLL
            for (int i = 0; i < kThreadTokens; ++i) {
                if (i >= seen) s[i] = kNothingSeen;
                top = larger(top, s[i]);
            }
            float max = state.max[pass], alpha = 1;
            if (any(top > max + kSlack)) {
                MLA_UNROLL
                for (int mask = kRowThreads / 2; mask; mask /= 2)
                    top = larger(top, shuffle_xor(top, mask));
                if (top > max + kSlack) max = top;
                alpha = exp2_fast(state.max[pass] - max);
            }
            float sum = state.sum[pass] * alpha;
            // The sum takes the probabilities as rounded, so that weights add up to one.
            const float base = max == kNothingSeen ? 0 : max;
            const auto probability = [&](int i) { return exp2_fast(s[i] - base); };
            ThreadProbs probs;
            probs.x = pack_half2(probability(0), probability(1));
            sum += half2_sum(probs.x);
            if constexpr (kThreadTokens == 4) {
                probs.y = pack_half2(probability(2), probability(3));
                sum += half2_sum(probs.y);
            }
            store(probabilities + (row * kProbStride + at) * 2, probs);
            state.max[pass] = max;
            state.sum[pass] = sum;
            if (at == 0) alphas[row] = alpha;
        }
    }

    static MLA_DEVICE void values(const uint8_t* const (&at)[kMaxParts], const Thread& thread,
                                  State& state) {
        const uint8_t* probabilities = thread.shared + kScoreBytes;
        const float* alphas =
            reinterpret_cast<const float*>(thread.shared + kScoreBytes + kProbBytes);
        const int group = thread.lane() / 4, quad = thread.lane() % 4;
        MLA_UNROLL
        for (int r = 0; r < RowTiles; ++r) {
            const float alpha = alphas[16 * r + group], below = alphas[16 * r + group + 8];
            if (alpha == 1 && below == 1) continue;
            MLA_UNROLL
            for (int j = 0; j < kGroupTiles; ++j) {
                state.o[r][j][0] *= alpha;
                state.o[r][j][1] *= alpha;
                state.o[r][j][2] *= below;
                state.o[r][j][3] *= below;
            }
            state.o_zero[r][0] *= alpha;
            state.o_zero[r][2] *= below;
        }
        MLA_UNROLL_BY(kUnroll)
        for (int step = 0; step < kTile / 16; ++step) {
            uint32_t b[kGroupTiles][2];
            Format::template values<Rank>(at, thread.warp(), step, group, quad, b);
            MLA_UNROLL
            for (int r = 0; r < RowTiles; ++r) {
                const int token = 16 * step + 4 * quad;
                const uint8_t* row = probabilities + ((16 * r + group) * kProbStride + token) * 2;
                const Words2 above = load<Words2>(row);
                const Words2 below = load<Words2>(row + 8 * kProbStride * 2);
                uint32_t a[4] = {above.x, below.x, above.y, below.y};
                if constexpr (Format::kFolded) {
                    const Words2 zeros = Format::four_zeros(at, thread.warp(), token);
                    const Words2 scales = Format::four_scales(at, thread.warp(), token);
                    mma(state.o_zero[r], a, zeros.x, zeros.y);
                    MLA_UNROLL
                    for (int i = 0; i < 4; ++i) a[i] = half2_mul(a[i], i < 2 ? scales.x : scales.y);
                }
                MLA_UNROLL
                for (int j = 0; j < kGroupTiles; ++j) mma(state.o[r][j], a, b[j][0], b[j][1]);
            }
        }
    }

    // ---- the end ----------------------------------------------------------------------------

    static MLA_DEVICE float value_of(const State& state, int r, int tile, int i) {
        if constexpr (Format::kFolded)
            return Format::value_factor(tile) * state.o[r][tile][i] + state.o_zero[r][i / 2 * 2];
        else
            return state.o[r][tile][i];
    }

    static MLA_DEVICE void finish(const Params& p, const Rows& rows, const Thread& thread,
                                  State& state) {
        const int split = thread.block_x;
        MLA_UNROLL
        for (int pass = 0; pass < kPasses; ++pass) {
            float sum = state.sum[pass];
            MLA_UNROLL
            for (int mask = kRowThreads / 2; mask; mask /= 2) sum += shuffle_xor(sum, mask);
            const int row = pass * (kThreads / kRowThreads) + thread.index / kRowThreads;
            if (row < rows.count && thread.index % kRowThreads == 0)
                store<Floats2>(p.partial + (int64_t{rows.first + row} * p.splits + split) * 2,
                               {state.max[pass], sum});
        }
        MLA_UNROLL
        for (int r = 0; r < RowTiles; ++r) {
            if (kRowTile * r >= rows.count) break;
            float* o = partial_sums(p, thread.block_z, rows.tile + r, split) +
                       (thread.warp() * kPieces * kWarpLanes + thread.lane()) * 4;
            MLA_UNROLL
            for (int piece = 0; piece < kPieces; ++piece) {
                const int j = piece % 2 * 4, i = piece / 2;
                store<Floats4>(o + piece * kWarpLanes * 4,
                               {value_of(state, r, j, i), value_of(state, r, j + 1, i),
                                value_of(state, r, j + 2, i), value_of(state, r, j + 3, i)});
            }
        }
    }

    // Grid: x runs of tiles, y blocks of rows, z sequences.
    static MLA_DEVICE void run(const Params& p, const Thread& thread) {
        const int b = thread.block_z, split = thread.block_x;
        const Sequence sequence = view_sequence(p, b);
        const int sequence_rows = p.round_steps * p.heads;
        const int real_rows =
            min_of(max_of(sequence.fresh - p.first_step, 0), p.round_steps) * p.heads;
        Rows rows;
        rows.begin = thread.block_y * kRows;
        rows.count = min_of(real_rows - rows.begin, kRows);
        if (rows.count <= 0) return begin_overlapped();
        rows.first = b * sequence_rows + rows.begin;
        rows.tile = thread.block_y * RowTiles;

        // Tokens that the last row sees, hence all that this block reads.
        const int last_step = p.first_step + (rows.begin + rows.count - 1) / p.heads;
        const int length = sequence.past + last_step + 1;
        const int tiles = (length + kTile - 1) / kTile;
        const int begin = static_cast<int>(static_cast<int64_t>(tiles) * split / p.splits);
        const int end = static_cast<int>(static_cast<int64_t>(tiles) * (split + 1) / p.splits);
        if (begin == end) {
            begin_overlapped();
            for (int row = thread.index; row < rows.count; row += kThreads)
                store<Floats2>(p.partial + (int64_t{rows.first + row} * p.splits + split) * 2,
                               {kNothingSeen, 0});
            return;
        }

        constexpr int kPageTiles = kPageTokens / kTile;
        uint8_t* stages = thread.shared + kFixedBytes;
        const int stage_bytes = tile_bytes(rope_of(p));
        // The table's entry for the tile to copy next, read a tile ahead so that nobody waits for
        // it.
        int64_t entry = sequence.table[begin / kPageTiles];
        const auto copy = [&](int tile, int stage) {
            if (tile < end) {
                const int page = static_cast<int>(checked_page(p, entry));
                if (tile + 1 < end) entry = sequence.table[(tile + 1) / kPageTiles];
                start_copies(p, page, tile % kPageTiles * kTile, length - tile * kTile,
                             stages + stage * stage_bytes, thread.index);
            }
            commit_copies();  // an empty group at the end, so that counting stays simple
        };
        // Tiles without new tokens need not wait for Prepare.
        const int settled = min_of(begin + p.stages, sequence.past / kTile);
        int started = begin;
        for (; started < settled; ++started) copy(started, started - begin);
        begin_overlapped();
        for (; started < begin + p.stages; ++started) copy(started, started - begin);

        State state;
        start_rows(p, sequence, rows, thread, state);
        const uint8_t* at[kMaxParts];
        // Values of `tile`, scores and probabilities of the next one, which is in stage `stage`.
        for (int tile = begin - 1, stage = 0;; ++tile, ++stage) {
            wait_copies(tile < begin ? p.stages - 1 : p.stages - 2);
            barrier();  // the next tile is there, and so are this one's probabilities
            if (tile < begin) {
                if constexpr (Format::kFolded) load_sums(thread, state);
            } else {
                values(at, thread, state);
                if (tile + 1 == end) break;
            }
            if (stage == p.stages) stage = 0;
            find_parts(stages + stage * stage_bytes, rope_of(p), at);
            scores(p, at, thread, state);
            barrier();  // all scores are there, and this tile is done with
            if (tile >= begin) copy(tile + p.stages, stage == 0 ? p.stages - 1 : stage - 1);
            softmax((tile + 1) * kTile, thread, state);
        }
        finish(p, rows, thread, state);
    }
};

}  // namespace mla::cuda
