// Lengths and pages of a sequence, read on the device, where nobody has checked them yet.
#pragma once

#include "cuda/device.h"
#include "cuda/params.h"

namespace mla::cuda {

constexpr float kNothingSeen = -1e30f;  // the maximum over no scores
// A row's maximum is raised only when exceeded by 2^kSlack, so that sums are rarely rescaled.
constexpr float kSlack = 3;

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

// A page of a block table. One that the arena lacks is reported, and replaced by the scratch page:
// wrong numbers are better than somebody else's memory.
MLA_DEVICE int64_t checked_page(const Params& p, int64_t page) {
    if (page >= 0 && page < p.pages) return page;
    report(p, kBadPage);
    return 0;
}

// Page `index` of a sequence.
MLA_DEVICE int64_t page_of(const Params& p, const Sequence& sequence, int index) {
    return checked_page(p, sequence.table[index]);
}

MLA_DEVICE float load_real(const Reals& reals, int64_t at) {
    if (reals.type == Element::kFp32) return static_cast<const float*>(reals.data)[at];
    const uint16_t bits = static_cast<const uint16_t*>(reals.data)[at];
    if (reals.type == Element::kFp16) return half_value(bits);
    return bits_float(static_cast<uint32_t>(bits) << 16);
}

// Numbers at, at + stride, ...; loads do not wait for each other.
template <int Count>
MLA_DEVICE void load_reals(const Reals& reals, int64_t at, int stride, float (&x)[Count]) {
    if (reals.type == Element::kFp32) {
        const float* from = static_cast<const float*>(reals.data) + at;
        MLA_UNROLL
        for (int i = 0; i < Count; ++i) x[i] = from[i * stride];
        return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(reals.data) + at;
    const bool is_half = reals.type == Element::kFp16;
    uint16_t bits[Count];
    MLA_UNROLL
    for (int i = 0; i < Count; ++i) bits[i] = from[i * stride];
    MLA_UNROLL
    for (int i = 0; i < Count; ++i)
        x[i] = is_half ? half_value(bits[i]) : bits_float(static_cast<uint32_t>(bits[i]) << 16);
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
