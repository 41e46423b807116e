// Scores of a tile (attend.h), a quarter of the channels a warp.
#pragma once

#include "cuda/attend.h"

namespace mla::cuda {

template <class Format, int Rank, int RowTiles, int Rope>
MLA_DEVICE void Attend<Format, Rank, RowTiles, Rope>::scores(const Params& p,
                                                             const uint8_t* const (&at)[kMaxParts],
                                                             const Thread& thread,
                                                             const State& state) {
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
                    for (int r = 0; r < RowTiles; ++r) mma(sums[r], state.q_sum[r], zeros, zeros);
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

}  // namespace mla::cuda
