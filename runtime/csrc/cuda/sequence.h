// Lengths and pages of a sequence, read on the device, where nobody has checked them yet.
#pragma once

#include "cuda/device.h"
#include "cuda/params.h"

namespace mla::cuda {

constexpr float kNothingSeen = -1e30f;  // the maximum over no scores

struct Sequence {
    int past;   // tokens in the cache before the call
    int fresh;  // tokens of S that are real
    const int64_t* table;

    MLA_DEVICE int length() const { return past + fresh; }
};

MLA_DEVICE void report(const Params& p, Problem problem) {
    if (p.problem) *p.problem = problem;
}

// Lengths that do not fit are reported, and count as no tokens at all.
MLA_DEVICE Sequence view_sequence(const Params& p, int b) {
    const int64_t past = p.past_lengths[b], fresh = p.new_lengths[b];
    const int64_t room = static_cast<int64_t>(p.table_pages) * kPageTokens;
    const int64_t* table = p.block_table + static_cast<int64_t>(b) * p.table_pages;
    if (past < 0 || fresh < 0 || fresh > p.steps || past > room || fresh > room - past) {
        report(p, kBadLength);
        return {0, 0, table};
    }
    return {static_cast<int>(past), static_cast<int>(fresh), table};
}

// Page `index` of a sequence. One that the arena lacks is reported, and replaced by the scratch
// page: wrong numbers are better than somebody else's memory.
MLA_DEVICE int64_t page_of(const Params& p, const Sequence& sequence, int index) {
    const int64_t page = sequence.table[index];
    if (page >= 0 && page < p.pages) return page;
    report(p, kBadPage);
    return 0;
}

MLA_DEVICE float load_real(const Reals& reals, int64_t at) {
    if (reals.type == Element::kFp32) return static_cast<const float*>(reals.data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(reals.data)[at];
    if (reals.type == Element::kFp16) return half_value(bits);
    return bits_float(static_cast<uint32_t>(bits) << 16);
}

MLA_DEVICE void store_real(const Reals& reals, int64_t at, float x) {
    if (reals.type == Element::kFp32) {
        static_cast<float*>(reals.data)[at] = x;
    } else if (reals.type == Element::kFp16) {
        static_cast<uint16_t*>(reals.data)[at] = half_bits(x);
    } else {
        const uint32_t bits = float_bits(x);
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        const uint32_t rounded = is_nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
        static_cast<uint16_t*>(reals.data)[at] = static_cast<uint16_t>(rounded >> 16);
    }
}

// Pair `i` of RoPE on neighbouring pairs: rotated (even, odd), every product rounded by itself.
MLA_DEVICE Floats2 rotate_pair(float even, float odd, float cos, float sin) {
    return {sub_exact(mul_exact(even, cos), mul_exact(odd, sin)),
            add_exact(mul_exact(even, sin), mul_exact(odd, cos))};
}

}  // namespace mla::cuda
