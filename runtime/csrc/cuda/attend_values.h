// Sums of values over a tile (attend.h), 64 channels a warp, and what a run of tiles leaves behind.
#pragma once

#include "cuda/attend.h"

namespace mla::cuda {

template <class Format, int Rank, int RowTiles, int Rope>
MLA_DEVICE void Attend<Format, Rank, RowTiles, Rope>::values(const uint8_t* const (&at)[kMaxParts],
                                                             const Thread& thread, State& state) {
    const uint8_t* probabilities = thread.shared + kScoreBytes;
    const float* alphas = reinterpret_cast<const float*>(thread.shared + kScoreBytes + kProbBytes);
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

template <class Format, int Rank, int RowTiles, int Rope>
MLA_DEVICE float Attend<Format, Rank, RowTiles, Rope>::value_of(const State& state, int r, int tile,
                                                                int i) {
    if constexpr (Format::kFolded)
        return Format::value_factor(tile) * state.o[r][tile][i] + state.o_zero[r][i / 2 * 2];
    else
        return state.o[r][tile][i];
}

template <class Format, int Rank, int RowTiles, int Rope>
MLA_DEVICE void Attend<Format, Rank, RowTiles, Rope>::finish(const Params& p, const Rows& rows,
                                                             const Thread& thread, State& state) {
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

}  // namespace mla::cuda
