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
    static constexpr int kAtOnce = 4;  // runs that a thread reads
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
    };

    // Joins `Count` of them, all read before the first is needed. What a run without tokens says
    // of o is not a number that anybody wrote.
    template <int Count>
    static MLA_DEVICE void join(const Floats2 (&runs)[Count], const Floats4 (&o)[Count],
                                Softmax& all) {
        float max = all.max;
        MLA_UNROLL
        for (int i = 0; i < Count; ++i) max = larger(max, runs[i].x);
        const float before = exp2_fast(all.max - max);
        all.max = max;
        all.sum *= before;
        all.o = {before * all.o.x, before * all.o.y, before * all.o.z, before * all.o.w};
        MLA_UNROLL
        for (int i = 0; i < Count; ++i) {
            const bool is_empty = runs[i].y == 0;
            const float weight = exp2_fast(runs[i].x - max);
            all.sum += weight * runs[i].y;
            all.o.x += is_empty ? 0 : weight * o[i].x;
            all.o.y += is_empty ? 0 : weight * o[i].y;
            all.o.z += is_empty ? 0 : weight * o[i].z;
            all.o.w += is_empty ? 0 : weight * o[i].w;
        }
    }

    // Grid: x blocks that share a row tile, y row tiles, z sequences.
    static MLA_DEVICE void run(const Params& p, const Thread& thread) {
        begin_overlapped();
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
            for (int first = slot; first < p.splits; first += kAtOnce * abreast) {
                Floats2 runs[kAtOnce];
                Floats4 o[kAtOnce];
                MLA_UNROLL
                for (int i = 0; i < kAtOnce; ++i) {
                    const int k = first + i * abreast;
                    const bool exists = k < p.splits;
                    runs[i] = exists ? load<Floats2>(partial + 2 * k) : Floats2{kNothingSeen, 0};
                    o[i] = exists ? load<Floats4>(partial_sums(p, b, tile, k) + at * 4)
                                  : Floats4{0, 0, 0, 0};
                }
                join(runs, o, mine);
            }
        }
        Floats4* o = reinterpret_cast<Floats4*>(thread.shared);
        Floats2* sums = reinterpret_cast<Floats2*>(thread.shared + kThreads * 16);
        store<Floats4>(o + thread.index, mine.o);
        store<Floats2>(sums + thread.index, {mine.max, mine.sum});
        barrier();
        if (slot > 0 || row >= rows) return;
        for (int i = lane + lanes; i < kThreads; i += lanes) {
            const Floats2 other[1] = {load<Floats2>(sums + i)};
            const Floats4 other_o[1] = {load<Floats4>(o + i)};
            join(other, other_o, mine);
        }
        const float scale = mine.sum > 0 ? 1 / mine.sum : 0;
        store<Floats4>(p.latents + of_all * p.rank + piece.channel,
                       {scale * mine.o.x, scale * mine.o.y, scale * mine.o.z, scale * mine.o.w});
    }
};

}  // namespace mla::cuda
