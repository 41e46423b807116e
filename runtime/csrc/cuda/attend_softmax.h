// From scores of a tile to probabilities (attend.h), 16 threads a row.
#pragma once

#include "cuda/attend.h"

namespace mla::cuda {

template <class Format, int Rank, int RowTiles, int Rope>
MLA_DEVICE void Attend<Format, Rank, RowTiles, Rope>::softmax(int first, const Thread& thread,
                                                              State& state) {
    const float* scores = reinterpret_cast<const float*>(thread.shared);
    uint8_t* probabilities = thread.shared + kScoreBytes;
    float* alphas = reinterpret_cast<float*>(thread.shared + kScoreBytes + kProbBytes);
    const int at = thread.index % kRowThreads * kThreadTokens;
    MLA_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
        const int row = pass * (kThreads / kRowThreads) + thread.index / kRowThreads;
        float s[kThreadTokens];
        MLA_UNROLL
        for (int quarter = 0; quarter < kQuarters; ++quarter) {
            const float* from = scores + (quarter * kRows + row) * kScoreStride + at;
            const auto some = load<ThreadScores>(from);
            s[0] = quarter ? s[0] + some.x : some.x;
            s[1] = quarter ? s[1] + some.y : some.y;
            if constexpr (kThreadTokens == 4) {
                s[2] = quarter ? s[2] + some.z : some.z;
                s[3] = quarter ? s[3] + some.w : some.w;
            }
        }
        const int seen = state.visible[pass] - first - at;  // of this thread's tokens
        float top = kNothingSeen;
        MLA_UNROLL
        for (int i = 0; i < kThreadTokens; ++i) {
            if (i >= seen) s[i] = kNothingSeen;
            top = larger(top, s[i]);
        }
        float max = state.max[pass], alpha = 1;
        if (any(top > max + kSlack)) {
            MLA_UNROLL
            for (int mask = kRowThreads / 2; mask; mask /= 2)
                top = larger(top, shuffle_xor(top, mask));
            if (top > max + kSlack) max = top;
            alpha = exp2_fast(state.max[pass] - max);
        }
        float sum = state.sum[pass] * alpha;
        // The sum takes the probabilities as rounded, so that weights add up to one.
        const float base = max == kNothingSeen ? 0 : max;
        const auto probability = [&](int i) { return exp2_fast(s[i] - base); };
        ThreadProbs probs;
        probs.x = pack_half2(probability(0), probability(1));
        sum += half2_sum(probs.x);
        if constexpr (kThreadTokens == 4) {
            probs.y = pack_half2(probability(2), probability(3));
            sum += half2_sum(probs.y);
        }
        store(probabilities + (row * kProbStride + at) * 2, probs);
        state.max[pass] = max;
        state.sum[pass] = sum;
        if (at == 0) alphas[row] = alpha;
    }
}

}  // namespace mla::cuda
