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
// p is at most 2^kSlack, which leaves (p scale) in half's range. What is left at the end are sums
// relative to a maximum; merge.h joins the runs of tiles.
#pragma once

#include <type_traits>

#include "cuda/fragments.h"
#include "cuda/sequence.h"

namespace mla::cuda {

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
    static MLA_DEVICE void load_sums(const Thread& thread, State& state);

    static MLA_DEVICE void start_rows(const Params& p, const Sequence& sequence, const Rows& rows,
                                      const Thread& thread, State& state);

    // ---- a tile -----------------------------------------------------------------------------

    // Starts the copies of part I and those after it. Columns are few: other threads copy those of
    // each part.
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

    static MLA_DEVICE void find_parts(const uint8_t* tile, int rope,
                                      const uint8_t* (&at)[kMaxParts]) {
        MLA_UNROLL
        for (int i = 0; i < Format::kParts; ++i) {
            at[i] = tile;
            tile += TilePart<kTile>::bytes(Format::part(i, Rank, rope));
        }
    }

    static MLA_DEVICE void scores(const Params& p, const uint8_t* const (&at)[kMaxParts],
                                  const Thread& thread, const State& state);

    // first: the tile's first token in its sequence.
    static MLA_DEVICE void softmax(int first, const Thread& thread, State& state);

    static MLA_DEVICE void values(const uint8_t* const (&at)[kMaxParts], const Thread& thread,
                                  State& state);

    // ---- the end ----------------------------------------------------------------------------

    static MLA_DEVICE float value_of(const State& state, int r, int tile, int i);

    static MLA_DEVICE void finish(const Params& p, const Rows& rows, const Thread& thread,
                                  State& state);

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
                start_copy<0>(p, page, tile % kPageTiles * kTile, length - tile * kTile,
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

#include "cuda/attend_rows.h"
#include "cuda/attend_scores.h"
#include "cuda/attend_softmax.h"
#include "cuda/attend_values.h"
