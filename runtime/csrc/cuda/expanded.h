// Attention of new tokens to keys and values that expand.h made, a chunk of the sequence's tokens:
// the expanded mode, for prompts. It takes N + R + V products a (query, key) pair, where the
// absorbed one takes 2 D + R; making keys and values takes D (N + V) for each token of the cache,
// once for all queries of a round.
//
// A block has the queries of one head, kRows tokens; a warp's rows are its own, from scores to sums
// (FlashAttention-2, Dao 2023):
//
//     queries   in shared memory: q_nope and the rotated q_pe, scaled, in half
//     scores    16 or 32 rows a warp, 64 keys; in registers
//     softmax   among the four lanes of a row
//     values    probabilities, in half, are operands as they are
//
// Values of a tile arrive during its scores, keys of the next one during softmax and values. What a
// thread has summed up when a chunk ends waits in the workspace for the next chunk.
#pragma once

#include "cuda/panel.h"
#include "cuda/sequence.h"

namespace mla::cuda {

// KeyWidth and ValueWidth: N + R and V, or more; the rest is zeros. RowTiles: of 16 rows, a warp.
template <int KeyWidth, int ValueWidth, int RowTiles>
struct Expanded {
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * kWarpLanes;
    static constexpr int kMinBlocks = 2;
    static constexpr int kWarpRows = 16 * RowTiles;
    static constexpr int kRows = kWarps * kWarpRows;
    static constexpr int kTile = 64;
    static constexpr int kKeyTiles = kTile / 8;
    static constexpr int kValueTiles = ValueWidth / 8;

    using Queries = Panels<kRows, KeyWidth>;
    using Keys = Panels<kTile, KeyWidth>;
    using Values = Panels<kTile, ValueWidth>;
    static constexpr int kSharedBytes = Queries::kBytes + Keys::kBytes + Values::kBytes;

    // What a thread keeps between chunks: two rows of each row tile.
    struct State {
        float o[RowTiles][kValueTiles][4];
        float max[RowTiles][2], sum[RowTiles][2];
    };
    static constexpr int kStateFloats = RowTiles * (4 * kValueTiles + 4);
    static constexpr uint32_t kOnes = 0x3c003c00;  // two halves

    // ---- queries ----------------------------------------------------------------------------

    // Those of `count` tokens from `first` on, of the call's tokens of sequence b.
    static MLA_DEVICE void load_queries(const Params& p, int b, int head, int first, int count,
                                        const Thread& thread) {
        Queries::template share<kThreads, 2>(thread.index, [&](uint32_t row, uint32_t chunk,
                                                               uint32_t place) {
            Words4 words = {0, 0, 0, 0};
            const int channel = 8 * static_cast<int>(chunk);
            if (static_cast<int>(row) < count && channel < p.nope + p.rope) {
                const int64_t token = int64_t{b} * p.steps + first + row;
                float x[8];
                load_reals(p.q, token * p.q.stride + int64_t{head} * (p.nope + p.rope) + channel, 1,
                           x);
                if (channel >= p.nope) {
                    const int64_t angle = token * (p.rope / 2) + (channel - p.nope) / 2;
                    MLA_UNROLL
                    for (int i = 0; i < 4; ++i) {
                        const Floats2 rotated =
                            rotate_pair(x[2 * i], x[2 * i + 1], p.cos[angle + i], p.sin[angle + i]);
                        x[2 * i] = rotated.x;
                        x[2 * i + 1] = rotated.y;
                    }
                }
                uint32_t pairs[4];
                MLA_UNROLL
                for (int i = 0; i < 4; ++i)
                    pairs[i] = pack_half2(in_range(x[2 * i] * p.query_scale),
                                          in_range(x[2 * i + 1] * p.query_scale));
                words = {pairs[0], pairs[1], pairs[2], pairs[3]};
            }
            store<Words4>(thread.shared + place, words);
        });
    }

    // ---- a tile -----------------------------------------------------------------------------

    // first: of the tile, in the chunk.
    static MLA_DEVICE void copy_keys(const Params& p, int b, int head, int first, uint8_t* keys,
                                     const Thread& thread) {
        const int64_t token = int64_t{b} * p.chunk_tokens + first;
        const uint16_t* nope =
            p.keys + ((int64_t{b} * p.heads + head) * p.chunk_tokens + first) * p.nope;
        const uint16_t* rope = p.k_pe + token * p.rope;
        Keys::template share<kThreads, kAll>(
            thread.index, [&](uint32_t row, uint32_t chunk, uint32_t place) {
                const int channel = 8 * static_cast<int>(chunk), of_rope = channel - p.nope;
                const bool exists = of_rope < p.rope;
                copy_async(keys + place,
                           of_rope < 0 ? nope + row * p.nope + channel
                                       : rope + row * p.rope + (exists ? of_rope : 0),
                           exists ? kChunk : 0);
            });
        commit_copies();
    }

    static MLA_DEVICE void copy_values(const Params& p, int b, int head, int first, uint8_t* values,
                                       const Thread& thread) {
        const uint16_t* from =
            p.values + ((int64_t{b} * p.heads + head) * p.chunk_tokens + first) * p.v;
        Values::template share<kThreads, kAll>(
            thread.index, [&](uint32_t row, uint32_t chunk, uint32_t place) {
                const int channel = 8 * static_cast<int>(chunk);
                const bool exists = channel < p.v;
                copy_async(values + place, from + row * p.v + (exists ? channel : 0),
                           exists ? kChunk : 0);
            });
        commit_copies();
    }

    static MLA_DEVICE void scores(const uint8_t* keys, const Thread& thread,
                                  float (&s)[RowTiles][kKeyTiles][4]) {
        const uint32_t q_place = Queries::rows_place(thread.warp() * kWarpRows, thread.lane());
        const uint32_t k_place = Keys::columns_place(thread.lane());
        MLA_UNROLL
        for (int t = 0; t < RowTiles; ++t) {
            MLA_UNROLL
            for (int j = 0; j < kKeyTiles; ++j) {
                MLA_UNROLL
                for (int i = 0; i < 4; ++i) s[t][j][i] = 0;
            }
        }
        MLA_UNROLL
        for (int step = 0; step < KeyWidth / 16; ++step) {
            uint32_t a[RowTiles][4];
            MLA_UNROLL
            for (int t = 0; t < RowTiles; ++t)
                load_matrices(a[t], thread.shared + Queries::moved(q_place, 16 * t, 2 * step));
            MLA_UNROLL
            for (int j = 0; j < kKeyTiles; j += 2) {
                uint32_t b[4];
                load_matrices(b, keys + Keys::moved(k_place, 8 * j, 2 * step));
                MLA_UNROLL
                for (int t = 0; t < RowTiles; ++t) {
                    mma(s[t][j], a[t], b[0], b[1]);
                    mma(s[t][j + 1], a[t], b[2], b[3]);
                }
            }
        }
    }

    // From scores to probabilities. seen: tokens of this tile that the thread's first row sees,
    // which may be more than there are, or negative; the rows below see one more each. Masked: some
    // row does not see the whole tile.
    template <bool Masked>
    static MLA_DEVICE void softmax(int seen, const Thread& thread,
                                   float (&s)[RowTiles][kKeyTiles][4], State& state) {
        const int quad = thread.lane() % 4;
        MLA_UNROLL
        for (int t = 0; t < RowTiles; ++t) {
            MLA_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int visible = seen + 16 * t + 8 * half - 2 * quad;
                float top = kNothingSeen;
                MLA_UNROLL
                for (int j = 0; j < kKeyTiles; ++j) {
                    MLA_UNROLL
                    for (int i = 0; i < 2; ++i) {
                        float& score = s[t][j][2 * half + i];
                        if (Masked && 8 * j + i >= visible) score = kNothingSeen;
                        top = larger(top, score);
                    }
                }
                MLA_UNROLL
                for (int mask = 1; mask < 4; mask *= 2) top = larger(top, shuffle_xor(top, mask));
                float& max = state.max[t][half];
                if (any(top > max + kSlack)) {
                    const float before = max;
                    if (top > max + kSlack) max = top;
                    const float alpha = exp2_fast(before - max);
                    state.sum[t][half] *= alpha;
                    MLA_UNROLL
                    for (int j = 0; j < kValueTiles; ++j) {
                        state.o[t][j][2 * half] *= alpha;
                        state.o[t][j][2 * half + 1] *= alpha;
                    }
                }
                const float base = max == kNothingSeen ? 0 : max;
                MLA_UNROLL
                for (int j = 0; j < kKeyTiles; ++j) {
                    MLA_UNROLL
                    for (int i = 0; i < 2; ++i)
                        s[t][j][2 * half + i] = exp2_fast(s[t][j][2 * half + i] - base);
                }
            }
        }
    }

    static MLA_DEVICE void add_values(const uint8_t* values, const Thread& thread,
                                      const float (&s)[RowTiles][kKeyTiles][4], State& state) {
        const uint32_t place = Values::columns_by_rows_place(thread.lane());
        uint32_t p[RowTiles][kTile / 16][4];
        MLA_UNROLL
        for (int t = 0; t < RowTiles; ++t) {
            float sums[4] = {};  // of probabilities as rounded, so that weights add up to one
            MLA_UNROLL
            for (int step = 0; step < kTile / 16; ++step) {
                MLA_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const float (&from)[4] = s[t][2 * step + i / 2];
                    p[t][step][i] = pack_half2(from[i % 2 * 2], from[i % 2 * 2 + 1]);
                }
                mma(sums, p[t][step], kOnes, kOnes);
            }
            state.sum[t][0] += sums[0];
            state.sum[t][1] += sums[2];
        }
        MLA_UNROLL
        for (int step = 0; step < kTile / 16; ++step) {
            MLA_UNROLL
            for (int j = 0; j < kValueTiles; j += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, values + Values::moved(place, 16 * step, j));
                MLA_UNROLL
                for (int t = 0; t < RowTiles; ++t) {
                    mma(state.o[t][j], p[t][step], b[0], b[1]);
                    mma(state.o[t][j + 1], p[t][step], b[2], b[3]);
                }
            }
        }
    }

    // ---- between chunks ---------------------------------------------------------------------

    // Calls each(number, place of it) for all that a thread keeps; neighbouring threads have
    // neighbouring places.
    template <class Each>
    static MLA_DEVICE void for_each(State& state, int thread, const Each& each) {
        MLA_UNROLL
        for (int t = 0; t < RowTiles; ++t) {
            MLA_UNROLL
            for (int j = 0; j < kValueTiles; ++j) {
                MLA_UNROLL
                for (int i = 0; i < 4; ++i)
                    each(state.o[t][j][i], ((t * kValueTiles + j) * 4 + i) * kThreads + thread);
            }
            MLA_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int at = RowTiles * kValueTiles * 4 + 4 * t + 2 * half;
                each(state.max[t][half], at * kThreads + thread);
                each(state.sum[t][half], (at + 1) * kThreads + thread);
            }
        }
    }

    // ---- the end ----------------------------------------------------------------------------

    static MLA_DEVICE void finish(const Params& p, int b, int head, int first, int count,
                                  const Thread& thread, const State& state) {
        const int group = thread.lane() / 4, quad = thread.lane() % 4;
        MLA_UNROLL
        for (int t = 0; t < RowTiles; ++t) {
            MLA_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int row = thread.warp() * kWarpRows + 16 * t + 8 * half + group;
                if (first + row >= p.first_step + p.round_steps) continue;
                const float scale = row < count ? 1 / state.sum[t][half] : 0;
                const int64_t at = (int64_t{b} * p.steps + first + row) * p.output.stride +
                                   int64_t{head} * p.v + 2 * quad;
                MLA_UNROLL
                for (int j = 0; j < kValueTiles; ++j) {
                    if (8 * j >= p.v) break;
                    store_real(p.output, at + 8 * j, scale * state.o[t][j][2 * half]);
                    store_real(p.output, at + 8 * j + 1, scale * state.o[t][j][2 * half + 1]);
                }
            }
        }
    }

    // Grid: x blocks of rows, y heads, z sequences. Rows of padded tokens become zeros.
    static MLA_DEVICE void run(const Params& p, const Thread& thread) {
        const int b = thread.block_z, head = thread.block_y;
        const int blocks = (p.round_steps + kRows - 1) / kRows;
        const int block = blocks - 1 - thread.block_x;  // the longest first
        const int first = p.first_step + block * kRows;
        const Sequence sequence = view_sequence(p, b);
        const int count = min_of(max_of(sequence.fresh - first, 0),
                                 min_of(p.first_step + p.round_steps - first, kRows));
        // Tokens that the last row sees, hence all that this block reads.
        const int length = count ? sequence.past + first + count : 0;
        const int end = p.first_token + p.chunk_tokens;
        if (p.first_token > 0 && length <= p.first_token) return;  // done in an earlier chunk

        State state;
        // Found anew at the end, as a pointer would take registers meanwhile.
        const auto kept = [&] {
            return p.running +
                   ((int64_t{b} * p.heads + head) * blocks + block) * kStateFloats * kThreads;
        };
        if (p.first_token > 0) {
            for_each(state, thread.index, [&](float& x, int at) { x = kept()[at]; });
        } else {
            for_each(state, 0, [](float& x, int) { x = 0; });
            MLA_UNROLL
            for (int t = 0; t < RowTiles; ++t) state.max[t][0] = state.max[t][1] = kNothingSeen;
        }

        uint8_t* keys = thread.shared + Queries::kBytes;
        uint8_t* values = keys + Keys::kBytes;
        const int tokens = min_of(length, end) - p.first_token;  // of this chunk
        if (tokens > 0) copy_keys(p, b, head, 0, keys, thread);
        load_queries(p, b, head, first, count, thread);
        const int row = thread.warp() * kWarpRows + thread.lane() / 4;
        for (int tile = 0; tile < tokens; tile += kTile) {
            wait_copies(0);
            barrier();  // keys are there, and the values of the tile before are done with
            copy_values(p, b, head, tile, values, thread);
            float s[RowTiles][kKeyTiles][4];
            scores(keys, thread, s);
            wait_copies(0);
            barrier();  // values are there, and the keys are done with
            if (tile + kTile < tokens) copy_keys(p, b, head, tile + kTile, keys, thread);
            const int seen = sequence.past + first + 1 - p.first_token - tile;  // by the first row
            if (seen < kTile)
                softmax<true>(seen + row, thread, s, state);
            else
                softmax<false>(seen + row, thread, s, state);
            add_values(values, thread, s, state);
        }
        if (length > end)
            for_each(state, thread.index, [&](float& x, int at) { kept()[at] = x; });
        else
            finish(p, b, head, first, count, thread, state);
    }
};

}  // namespace mla::cuda
