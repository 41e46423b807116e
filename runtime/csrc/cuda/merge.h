// Joins the softmaxes over runs of tiles to the one over all of them:
//
//     max = max_k max_k    o = sum_k 2^(max_k - max) o_k / sum_k 2^(max_k - max) sum_k
//
// A block has some pieces (fragments.h) of a row tile. Its threads are `slots` runs abreast: first
// each joins every slots-th run, then the slots are joined. Rows of padded tokens become zeros.
#pragma once

#include "cuda/fragments.h"
#include "cuda/sequence.h"

namespace mla::cuda {

struct Merge {
    static constexpr int kThreads = 256;
    static constexpr int kMinBlocks = 4;
    static constexpr int kMaxSlots = 16;
    static constexpr int kSharedBytes = kThreads * (16 + 8);

    static MLA_CONSTEXPR int slots(int splits) {
        int slots = 1;
        while (slots < splits && slots < kMaxSlots) slots *= 2;
        return slots;
    }
    // Blocks that share a row tile.
    static MLA_CONSTEXPR int blocks(int rank, int splits) {
        return kRowTile * rank / 4 * slots(splits) / kThreads;
    }

    // A softmax over some of the tokens: its maximum, and sums relative to it.
    struct Softmax {
        float max = kNothingSeen, sum = 0;
        Floats4 o = {0, 0, 0, 0};

        MLA_DEVICE void join(float other_max, float other_sum, const Floats4& x) {
            if (other_sum == 0) return;  // no tokens: x is not a number that anybody wrote
            const float both = max_of(max, other_max);
            const float mine = exp2_fast(max - both), theirs = exp2_fast(other_max - both);
            max = both;
            sum = mine * sum + theirs * other_sum;
            o.x = mine * o.x + theirs * x.x;
            o.y = mine * o.y + theirs * x.y;
            o.z = mine * o.z + theirs * x.z;
            o.w = mine * o.w + theirs * x.w;
        }
    };

    // Grid: x blocks that share a row tile, y row tiles, z sequences.
    static MLA_DEVICE void run(const Params& p, const Thread& thread) {
        const int b = thread.block_z, tile = thread.block_y;
        const int abreast = slots(p.splits), lanes = kThreads / abreast;
        const int slot = thread.index / lanes, lane = thread.index % lanes;
        const int at = thread.block_x * lanes + lane;  // of the tile's pieces
        const Piece piece = piece_of(p.folded, at / (kPieces * kWarpLanes),
                                     at / kWarpLanes % kPieces, at % kWarpLanes);
        const int row = tile * kRowTile + piece.row, rows = p.round_steps * p.heads;
        const int64_t of_all = static_cast<int64_t>(b) * rows + row;
        const Sequence sequence = view_sequence(p, b);
        Softmax mine;
        if (row < rows && p.first_step + row / p.heads < sequence.fresh) {
            const float* partial = p.partial + of_all * p.splits * 2;
            MLA_UNROLL_BY(8)
            for (int k = slot; k < p.splits; k += abreast) {
                const Floats2 run = load<Floats2>(partial + 2 * k);
                mine.join(run.x, run.y, load<Floats4>(partial_sums(p, b, tile, k) + at * 4));
            }
        }
        Floats4* o = reinterpret_cast<Floats4*>(thread.shared);
        Floats2* sums = reinterpret_cast<Floats2*>(thread.shared + kThreads * 16);
        store<Floats4>(o + thread.index, mine.o);
        store<Floats2>(sums + thread.index, {mine.max, mine.sum});
        barrier();
        if (slot > 0 || row >= rows) return;
        for (int i = lane + lanes; i < kThreads; i += lanes) {
            const Floats2 other = load<Floats2>(sums + i);
            mine.join(other.x, other.y, load<Floats4>(o + i));
        }
        const float scale = mine.sum > 0 ? 1 / mine.sum : 0;
        store<Floats4>(p.latents + of_all * p.rank + piece.channel,
                       {scale * mine.o.x, scale * mine.o.y, scale * mine.o.z, scale * mine.o.w});
    }
};

}  // namespace mla::cuda
