// What attend.h does before the first tile: queries become operands, and their sums too.
#pragma once

#include "cuda/attend.h"

namespace mla::cuda {

template <class Format, int Rank, int RowTiles, int Rope>
MLA_DEVICE void Attend<Format, Rank, RowTiles, Rope>::load_sums(const Thread& thread,
                                                                State& state) {
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

template <class Format, int Rank, int RowTiles, int Rope>
MLA_DEVICE void Attend<Format, Rank, RowTiles, Rope>::start_rows(const Params& p,
                                                                 const Sequence& sequence,
                                                                 const Rows& rows,
                                                                 const Thread& thread,
                                                                 State& state) {
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
        const Words4 words = load<Words4>(query_fragment(p, thread.block_z, rows.tile + r, step) +
                                          thread.lane() * 4);
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
                read(r, (quarter * kQuarterGroups + g) * kGroupSteps + step, state.q[g][step][r]);
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

}  // namespace mla::cuda
