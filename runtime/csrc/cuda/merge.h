// Joins the softmaxes over runs of tiles to the one over all of them:
//
//     max = max_k max_k    o = sum_k 2^(max_k - max) o_k / sum_k 2^(max_k - max) sum_k
//
// A block has some channels of a row, its threads are `slots` runs abreast: first each joins every
// slots-th run, then the slots are joined. The result takes the place of the row's query. Rows of
// padded tokens become zeros.
#pragma once

#include "cuda/sequence.h"

namespace mla::cuda {

struct Merge {
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 4;
    static constexpr int kMaxSlots = 16;
    static constexpr int kSharedBytes = kThreads * 16 + kMaxSlots * 8;

    // As many slots as there are runs, if that leaves no thread without a channel.
    static MLA_CONSTEXPR int slots(int rank, int splits) {
        int slots = kThreads / (rank / 4);
        while (slots < splits && slots < kMaxSlots) slots *= 2;
        return slots;
    }
    // Blocks that share a row.
    static MLA_CONSTEXPR int blocks(int rank, int splits) {
        return rank / 4 * slots(rank, splits) / kThreads;
    }

    // Grid: x rows of a sequence, y sequences, z blocks that share a row.
    static MLA_DEVICE void run(const Params& p, const Thread& thread) {
        const int b = thread.block_y;
        const Sequence sequence = view_sequence(p, b);
        const int64_t row = static_cast<int64_t>(b) * p.round_steps * p.heads + thread.block_x;
        const bool is_real = p.first_step + thread.block_x / p.heads < sequence.fresh;
        const float* partial = p.partial + row * p.splits * 2;
        const int abreast = slots(p.rank, p.splits), lanes = kThreads / abreast;
        const int slot = thread.index / lanes, lane = thread.index % lanes;
        const int channel = 4 * (thread.block_z * lanes + lane);

        float max = kNothingSeen, sum = 0;
        Floats4 o = {0, 0, 0, 0};
        if (is_real) {
            for (int k = slot; k < p.splits; k += abreast) max = max_of(max, partial[2 * k]);
            MLA_UNROLL_BY(4)
            for (int k = slot; k < p.splits; k += abreast) {
                const float run_sum = partial[2 * k + 1];
                if (run_sum == 0) continue;  // a run without tokens: o is not written
                const float weight = exp2_fast(partial[2 * k] - max);
                const Floats4 x =
                    load<Floats4>(p.partial_o + (row * p.splits + k) * p.rank + channel);
                sum += weight * run_sum;
                add_weighted(weight, x, o);
            }
        }
        Floats4* joined = reinterpret_cast<Floats4*>(thread.shared);
        Floats2* weights = reinterpret_cast<Floats2*>(thread.shared + kThreads * 16);
        store<Floats4>(joined + thread.index, o);
        if (lane == 0) store<Floats2>(weights + slot, {max, sum});
        barrier();
        if (slot > 0) return;
        float all_max = kNothingSeen, all_sum = 0;
        for (int i = 0; i < abreast; ++i) all_max = max_of(all_max, load<Floats2>(weights + i).x);
        o = {0, 0, 0, 0};
        for (int i = 0; i < abreast; ++i) {
            const Floats2 one = load<Floats2>(weights + i);
            const float weight = exp2_fast(one.x - all_max);
            all_sum += weight * one.y;
            add_weighted(weight, load<Floats4>(joined + i * lanes + lane), o);
        }
        const float scale = all_sum > 0 ? 1 / all_sum : 0;
        store<Floats4>(p.rows + row * (p.rank + p.rope) + channel,
                       {scale * o.x, scale * o.y, scale * o.z, scale * o.w});
    }

    static MLA_DEVICE void add_weighted(float weight, const Floats4& x, Floats4& sum) {
        sum.x += weight * x.x;
        sum.y += weight * x.y;
        sum.z += weight * x.z;
        sum.w += weight * x.w;
    }
};

}  // namespace mla::cuda
