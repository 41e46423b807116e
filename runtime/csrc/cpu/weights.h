// w_uk and w_uv as the kernels read them.
#pragma once

#include "cpu/kernels.h"
#include "cpu/latent_attention.h"

namespace mla::cpu {

struct PreparedWeights {
    AttentionDims dims;
    WeightPrecision precision;
    // Padding holds zeros: N and D to 32 (a bf16 tile step), V to 16 (a vector).
    int nope_padded, rank_padded, v_padded;
    // w_uk [H, nope_padded, rank_padded]; w_uv fp32 and int8 [H, rank_padded, v_padded],
    // bf16 [H, rank_padded / 2, v_padded, 2].
    void* w_uk;
    void* w_uv;
    float* uk_scale;  // [H, rank_padded], kInt8 only
    float* uv_scale;  // [H, v_padded], kInt8 only
    size_t bytes;

    bool exact() const { return precision == WeightPrecision::kFp32; }
    size_t element_bytes() const {
        return precision == WeightPrecision::kFp32   ? 4
               : precision == WeightPrecision::kBf16 ? 2
                                                     : 1;
    }
    const void* head_uk(int head) const {
        return static_cast<const uint8_t*>(w_uk) +
               element_bytes() * head * nope_padded * static_cast<size_t>(rank_padded);
    }
    const void* head_uv(int head) const {
        return static_cast<const uint8_t*>(w_uv) +
               element_bytes() * head * rank_padded * static_cast<size_t>(v_padded);
    }
    WeightLayout uk_layout() const {
        return precision == WeightPrecision::kFp32   ? WeightLayout::kRowsFp32
               : precision == WeightPrecision::kBf16 ? WeightLayout::kRowsBf16
                                                     : WeightLayout::kRowsInt8;
    }
    WeightLayout uv_layout() const {
        return precision == WeightPrecision::kFp32   ? WeightLayout::kRowsFp32
               : precision == WeightPrecision::kBf16 ? WeightLayout::kPairsBf16
                                                     : WeightLayout::kRowsInt8;
    }
};

// A head's weights in the elements of the expanded mode, if they are kept in others (int8, or bf16
// on an instruction set without a bf16 dot). Sizes as w_uk and w_uv above.
void expand_head_weights(const PreparedWeights& weights, int head, bool bf16, void* w_uk,
                         void* w_uv);

// True if the prepared arrays already are what the expanded mode wants.
inline bool head_weights_ready(const PreparedWeights& weights, bool bf16) {
    return weights.precision == (bf16 ? WeightPrecision::kBf16 : WeightPrecision::kFp32);
}

}  // namespace mla::cpu
