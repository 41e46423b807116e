// Joins the softmaxes over runs of tiles to the one over all of them, a block a row:
//
//     max = max_k max_k    o = sum_k 2^(max_k - max) o_k / sum_k 2^(max_k - max) sum_k
//
// The result takes the place of the row's query. Rows of padded tokens become zeros.
#pragma once

#include "cuda/sequence.h"

namespace mla::cuda {

struct Merge {
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 4;

    // Grid: x rows of a sequence, y sequences.
    static MLA_DEVICE void run(const Params& p, const Thread& thread) {
        const int b = thread.block_y;
        const Sequence sequence = view_sequence(p, b);
        const int64_t row = static_cast<int64_t>(b) * p.round_steps * p.heads + thread.block_x;
        float* out = p.rows + row * (p.rank + p.rope);
        const bool is_real = p.first_step + thread.block_x / p.heads < sequence.fresh;
        const float* partial = p.partial + row * p.splits * 2;
        float max = kNothingSeen, sum = 0;
        if (is_real) {
            for (int k = 0; k < p.splits; ++k) max = max_of(max, partial[2 * k]);
            for (int k = 0; k < p.splits; ++k)
                sum += exp2_fast(partial[2 * k] - max) * partial[2 * k + 1];
        }
        for (int channel = 4 * thread.index; channel < p.rank; channel += 4 * kThreads) {
            Floats4 o = {0, 0, 0, 0};
            for (int k = 0; is_real && k < p.splits; ++k) {
                if (partial[2 * k + 1] == 0) continue;  // a run without tokens: o is not written
                const float weight = exp2_fast(partial[2 * k] - max) / sum;
                const Floats4 x =
                    load<Floats4>(p.partial_o + (row * p.splits + k) * p.rank + channel);
                o.x += weight * x.x;
                o.y += weight * x.y;
                o.z += weight * x.z;
                o.w += weight * x.w;
            }
            store<Floats4>(out + channel, o);
        }
    }
};

}  // namespace mla::cuda
