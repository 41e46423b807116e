// The two projections that surround attention, a matrix product for each head:
//
//     queries   rows [.., 0 : D] = q_nope w_uk_h     rows [.., D : D + R] = rotated q_pe
//     outputs   output_h         = latents w_uv_h    latents: what merge.h left in rows
//
// For a few tokens they only read weights, for a prompt they are ordinary products; tensor cores
// serve both. Weights are read straight into fragments: lane (group, quad) takes 8 neighbouring
// columns of the rows that it needs, so that column n of tile j is column 8 n + j of 64.
#pragma once

#include "cuda/formats.h"
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

    // out(token, column, value) for the block's tokens and columns; in(token, k).
    template <class In, class Out>
    static MLA_DEVICE void multiply(const uint16_t* w, int inner, int width, int first_column,
                                    int tokens, const Thread& thread, const In& in,
                                    const Out& out) {
        const int group = thread.lane() / 4, quad = thread.lane() % 4;
        float sums[Tiles][8][4] = {};
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
        for (int i = thread.index; i < kTokens * kColumns; i += kThreads) {
            const int token = i / kColumns, column = i % kColumns;
            if (token >= tokens || first_column + column >= width) continue;
            float sum = 0;
            MLA_UNROLL
            for (int warp = 0; warp < kWarps; ++warp)
                sum += partial[(warp * kTokens + token) * kStride + padded(column)];
            out(token, first_column + column, sum);
        }
    }

    // Which tokens of a round a block has: `first` counts over all sequences.
    struct Tokens {
        int64_t first;
        int count;

        MLA_DEVICE Tokens(const Params& p, const Thread& thread) {
            const int64_t all = static_cast<int64_t>(p.batch) * p.round_steps;
            first = static_cast<int64_t>(thread.block_z) * kTokens;
            count = static_cast<int>(all - first < kTokens ? all - first : kTokens);
        }
        // Of the call's tokens [B, S].
        MLA_DEVICE int64_t of_call(const Params& p, int token) const {
            const int64_t at = first + token;
            return at / p.round_steps * p.steps + p.first_step + at % p.round_steps;
        }
    };

    static MLA_DEVICE float* row(const Params& p, const Tokens& tokens, int token, int head) {
        return p.rows + ((tokens.first + token) * p.heads + head) * (p.rank + p.rope);
    }

    struct Queries {
        static constexpr int kThreads = HeadMatmul::kThreads;
        static constexpr int kMinBlocks = HeadMatmul::kMinBlocks;

        // Grid: x = D / 64 column tiles and one for the rotation, y heads, z token tiles.
        static MLA_DEVICE void run(const Params& p, const Thread& thread) {
            const Tokens tokens(p, thread);
            const int head = thread.block_y;
            const auto at = [&](int token, int channel) {
                return load_real(p.q, tokens.of_call(p, token) * p.q.stride +
                                          static_cast<int64_t>(head) * (p.nope + p.rope) + channel);
            };
            if (thread.block_x == p.rank / kColumns) {
                const int pairs = p.rope / 2;
                for (int i = thread.index; i < tokens.count * pairs; i += kThreads) {
                    const int token = i / pairs, pair = i % pairs;
                    const int64_t angle = tokens.of_call(p, token) * pairs + pair;
                    const int channel = p.nope + 2 * pair;
                    const Floats2 x = rotate_pair(at(token, channel), at(token, channel + 1),
                                                  p.cos[angle], p.sin[angle]);
                    store<Floats2>(row(p, tokens, token, head) + p.rank + 2 * pair,
                                   {x.x * p.query_scale, x.y * p.query_scale});
                }
                return;
            }
            multiply(p.w_uk + static_cast<int64_t>(head) * p.nope * p.rank, p.nope, p.rank,
                     thread.block_x * kColumns, tokens.count, thread, at,
                     [&](int token, int column, float x) {
                         row(p, tokens, token, head)[column] = x * p.query_scale;
                     });
        }
    };

    struct Outputs {
        static constexpr int kThreads = HeadMatmul::kThreads;
        static constexpr int kMinBlocks = HeadMatmul::kMinBlocks;

        // Grid: x column tiles of V, y heads, z token tiles. Rows of padded tokens are zeros.
        static MLA_DEVICE void run(const Params& p, const Thread& thread) {
            const Tokens tokens(p, thread);
            const int head = thread.block_y;
            multiply(
                p.w_uv + static_cast<int64_t>(head) * p.rank * p.v, p.rank, p.v,
                thread.block_x * kColumns, tokens.count, thread,
                [&](int token, int channel) { return row(p, tokens, token, head)[channel]; },
                [&](int token, int column, float x) {
                    store_real(p.output,
                               tokens.of_call(p, token) * p.output.stride +
                                   static_cast<int64_t>(head) * p.v + column,
                               x);
                });
        }
    };
};

}  // namespace mla::cuda
