// The two projections that surround attention, a matrix product for each head:
//
//     queries   [q_nope w_uk_h, rotated q_pe], as fragments.h has them
//     outputs   output_h = latents w_uv_h
//
// For a few tokens they only read weights, for a prompt they are ordinary products; tensor cores
// serve both. Weights are read straight into fragments: lane (group, quad) takes 8 neighbouring
// columns of the rows that it needs, so that column n of tile j is column 8 n + j of 64.
#pragma once

#include "cuda/fragments.h"
#include "cuda/sequence.h"

namespace mla::cuda {

// Tiles: of 16 tokens, in one block.
template <int Tiles>
struct HeadMatmul {
    static constexpr int kWarps = Tiles == 1 ? 8 : 4;  // they share the inner dimension, by 16
    static constexpr int kThreads = kWarps * kWarpLanes;
    static constexpr int kMinBlocks = 2;
    static constexpr int kTokens = 16 * Tiles;
    static constexpr int kColumns = 64;
    static constexpr int kStride = kColumns + 8;  // floats of a row of partial sums
    static constexpr int kSharedBytes = kWarps * kTokens * kStride * 4;

    // Where a column lies in a row of partial sums: fragments are then written without conflicts.
    static MLA_DEVICE int padded(int column) { return column + column / 32 * 4; }

    // Rows k to k + 1 of columns `column` to `column` + 7, of w [inner, width]; zeros outside.
    static MLA_DEVICE Words4 weights(const uint16_t* w, int inner, int width, int k, int column) {
        if (k >= inner || column >= width) return {0, 0, 0, 0};
        return load<Words4>(w + static_cast<int64_t>(k) * width + column);
    }

    // Calls out(token, i, sum) for i from 0 to 15, each token's share of a thread, in which
    // sum(column) gives the block's columns `column` to `column` + 3; in(token, k).
    // Steps of the inner dimension whose weights are read at once: `Unroll`.
    template <int Unroll, class In, class Out>
    static MLA_DEVICE void multiply(const uint16_t* w, int inner, int width, int first_column,
                                    int tokens, const Thread& thread, const In& in,
                                    const Out& out) {
        const int group = thread.lane() / 4, quad = thread.lane() % 4;
        float sums[Tiles][8][4] = {};
        MLA_UNROLL_BY(Unroll)
        for (int k = 16 * thread.warp(); k < inner; k += 16 * kWarps) {
            uint32_t b[8][2];
            MLA_UNROLL
            for (int i = 0; i < 2; ++i) {
                const int row = k + 8 * i + 2 * quad, column = first_column + 8 * group;
                const Words4 even = weights(w, inner, width, row, column);
                const Words4 odd = weights(w, inner, width, row + 1, column);
                const uint32_t from[2][4] = {{even.x, even.y, even.z, even.w},
                                             {odd.x, odd.y, odd.z, odd.w}};
                MLA_UNROLL
                for (int j = 0; j < 8; ++j)
                    b[j][i] = permute(from[0][j / 2], from[1][j / 2], j % 2 ? 0x7632 : 0x5410);
            }
            MLA_UNROLL
            for (int t = 0; t < Tiles; ++t) {
                uint32_t a[4];
                MLA_UNROLL
                for (int i = 0; i < 4; ++i) {
                    const int token = 16 * t + group + 8 * (i % 2);
                    const int at = k + 2 * quad + 8 * (i / 2);
                    const bool inside = token < tokens && at < inner;
                    a[i] = inside ? pack_half2(in(token, at), in(token, at + 1)) : 0;
                }
                MLA_UNROLL
                for (int j = 0; j < 8; ++j) mma(sums[t][j], a, b[j][0], b[j][1]);
            }
        }
        float* partial = reinterpret_cast<float*>(thread.shared);
        MLA_UNROLL
        for (int t = 0; t < Tiles; ++t) {
            MLA_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int token = 16 * t + group + 8 * (i / 2), column = 8 * (2 * quad + i % 2);
                float* row = partial + (thread.warp() * kTokens + token) * kStride + padded(column);
                MLA_UNROLL
                for (int j = 0; j < 8; j += 4)
                    store<Floats4>(row + j, {sums[t][j][i], sums[t][j + 1][i], sums[t][j + 2][i],
                                             sums[t][j + 3][i]});
            }
        }
        barrier();
        for (int i = thread.index; i < kTokens * kColumns / 4; i += kThreads) {
            const int token = i / (kColumns / 4);
            if (token >= tokens) break;
            out(token, i % (kColumns / 4), [&](int column) {
                Floats4 sum = {0, 0, 0, 0};
                MLA_UNROLL
                for (int warp = 0; warp < kWarps; ++warp) {
                    const Floats4 x = load<Floats4>(partial + (warp * kTokens + token) * kStride +
                                                    padded(column));
                    sum.x += x.x;
                    sum.y += x.y;
                    sum.z += x.z;
                    sum.w += x.w;
                }
                return sum;
            });
        }
    }

    // Which tokens of a round a block has: `first` counts over all sequences.
    struct Tokens {
        int64_t first;
        int count;

        MLA_DEVICE Tokens(const Params& p, int64_t tile) {
            const int64_t all = static_cast<int64_t>(p.batch) * p.round_steps;
            first = tile * kTokens;
            count = static_cast<int>(all - first < kTokens ? all - first : kTokens);
        }
        // Of the call's tokens [B, S].
        MLA_DEVICE int64_t of_call(const Params& p, int token) const {
            const int64_t at = first + token;
            return at / p.round_steps * p.steps + p.first_step + at % p.round_steps;
        }
    };

    struct Queries {
        // Blocks: D / 64 column tiles and one for the rotation, of H heads, of token tiles.
        static MLA_CONSTEXPR int64_t blocks(const Params& p) {
            const int64_t tokens = int64_t{p.batch} * p.round_steps;
            return (p.rank / kColumns + 1) * p.heads * ((tokens + kTokens - 1) / kTokens);
        }

        // Lets put(fragment, row of the fragment) write step `step` of a token's row.
        template <class Put>
        static MLA_DEVICE void at_row(const Params& p, int64_t token, int head, int step,
                                      const Put& put) {
            const int b = static_cast<int>(token / p.round_steps);
            const int row = static_cast<int>(token % p.round_steps) * p.heads + head;
            put(query_fragment(p, b, row / kRowTile, step), row % kRowTile);
        }

        static MLA_DEVICE void run(const Params& p, int64_t block, const Thread& thread) {
            const int column_tiles = p.rank / kColumns + 1;
            const int column_tile = static_cast<int>(block % column_tiles);
            const int head = static_cast<int>(block / column_tiles % p.heads);
            const Tokens tokens(p, block / column_tiles / p.heads);
            const auto at = [&](int token, int channel) {
                return load_real(p.q, tokens.of_call(p, token) * p.q.stride +
                                          static_cast<int64_t>(head) * (p.nope + p.rope) + channel);
            };
            if (column_tile == p.rank / kColumns) {
                const int fours = p.rope / 4;
                for (int i = thread.index; i < tokens.count * fours; i += kThreads) {
                    const int token = i / fours, channel = i % fours * 4;
                    const int64_t angle = tokens.of_call(p, token) * (p.rope / 2) + channel / 2;
                    const auto rotated = [&](int pair) {
                        const int even = p.nope + channel + 2 * pair;
                        return rotate_pair(at(token, even), at(token, even + 1),
                                           p.cos[angle + pair], p.sin[angle + pair]);
                    };
                    const Floats2 x = rotated(0), y = rotated(1);
                    const float scale = p.query_scale;
                    at_row(p, tokens.first + token, head, p.rank / 16 + channel / 16,
                           [&](uint32_t* fragment, int row) {
                               put_query<QuadChannels>(
                                   fragment, row, channel % 16 / 4, 1,
                                   {x.x * scale, x.y * scale, y.x * scale, y.y * scale});
                           });
                }
                return;
            }
            multiply<1>(p.w_uk + static_cast<int64_t>(head) * p.nope * p.rank, p.nope, p.rank,
                        column_tile * kColumns, tokens.count, thread, at,
                        [&](int token, int i, const auto& sum) {
                            const int step = i / 4, quad = i % 4;
                            Floats4 x = sum(p.folded ? Int4Format::key_channels(step, quad)
                                                     : QuadChannels::key_channels(step, quad));
                            x = {x.x * p.query_scale, x.y * p.query_scale, x.z * p.query_scale,
                                 x.w * p.query_scale};
                            at_row(p, tokens.first + token, head, column_tile * kGroupSteps + step,
                                   [&](uint32_t* fragment, int row) {
                                       if (p.folded)
                                           put_query<Int4Format>(fragment, row, quad,
                                                                 Int4Format::key_factor(step), x);
                                       else
                                           put_query<QuadChannels>(fragment, row, quad, 1, x);
                                   });
                        });
        }
    };

    struct Outputs {
        static constexpr int kThreads = HeadMatmul::kThreads;
        static constexpr int kMinBlocks = HeadMatmul::kMinBlocks;

        // Grid: x column tiles of V, y heads, z token tiles. Rows of padded tokens are zeros.
        static MLA_DEVICE void run(const Params& p, const Thread& thread) {
            const int head = thread.block_y, first = thread.block_x * kColumns;
            const uint16_t* w = p.w_uv + static_cast<int64_t>(head) * p.rank * p.v;
            for (int row = thread.index; row < p.rank; row += kThreads)
                prefetch(w + static_cast<int64_t>(row) * p.v + first);
            begin_overlapped();
            const Tokens tokens(p, thread.block_z);
            multiply<Tiles == 1 ? 2 : 1>(
                w, p.rank, p.v, first, tokens.count, thread,
                [&](int token, int channel) {
                    return p.latents[((tokens.first + token) * p.heads + head) * p.rank + channel];
                },
                [&](int token, int i, const auto& sum) {
                    const int column = first + 4 * i;
                    if (column >= p.v) return;
                    const Floats4 x = sum(4 * i);
                    const int64_t at = tokens.of_call(p, token) * p.output.stride +
                                       static_cast<int64_t>(head) * p.v + column;
                    store_real(p.output, at, x.x);
                    store_real(p.output, at + 1, x.y);
                    store_real(p.output, at + 2, x.z);
                    store_real(p.output, at + 3, x.w);
                });
        }
    };
};

}  // namespace mla::cuda
