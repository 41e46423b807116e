// How queries, probabilities and pages are held while scores and values are computed straight from
// the codes of int4 and int8 pages (quant_dot.h, amx.h).
//
// With c = scale * code + zero, queries q ~ q_scale * q_code (8 bit a plane, a scale a group) and
// probabilities p * scale ~ factor * p_code:
//
//     score = sum_g scale_g (q_scale_g sum q_code * code) + zero_g (q_scale_g sum q_code)
//     o     = sum_g factor_g (sum_t p_code * (code - 8)) + sum_t p_t (zero_g + 8 scale_g)
//
// int4 takes one plane of 8 bit: its error lies 20 dB below the cache's own. int8 takes two planes
// of 7 bit (high * 128 + low).
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd/decode.h"

namespace mla::cpu {
namespace {

constexpr int kMaxPlanes = 2;
constexpr float kPlaneStep = 128;

// The rows of a task. Channels of o are in the order of the values' columns until finish().
struct QuantRows {
    int rows;
    int planes;
    int8_t* q[kMaxPlanes];  // [rows up to a multiple of 16, D]; the second may be null
    float* q_scale;         // [rows, groups]
    float* q_sum;           // [rows, groups] q_scale * sum of q_code
    float* scores;          // [rows, 64]; probabilities after the softmax
    float* beta;            // [rows] weight of this page's probabilities
    float* zeros;           // [rows, groups, 16] lanes of sum_t p_t centre_t
    // [groups, rows up to a multiple of 16, group]: a group's rows side by side, because rows of D
    // floats would all fall into the same few sets of the L1.
    float* o;
    int64_t o_group;  // from a group to the next

    float* o_at(int row, int g, int group) const { return o + g * o_group + int64_t{row} * group; }
};

// Fetches the next page while this one is worked on, a few lines at a time: more would wait for the
// buffers of the L1.
struct Prefetcher {
    static constexpr int kRanges = kMaxParts;
    const uint8_t* at[kRanges];
    const uint8_t* end[kRanges];
    int range;

    void start(const Record& record, int64_t page) {
        range = 0;
        for (int p = 0; p < kRanges; ++p) {
            at[p] = record.parts[p] ? record.parts[p] + page * record.page_bytes[p] : nullptr;
            end[p] = record.parts[p] ? at[p] + record.page_bytes[p] : nullptr;
        }
    }

    template <class X>
    void fetch(int lines) {
        while (lines > 0 && range < kRanges) {
            if (at[range] >= end[range]) {
                ++range;
                continue;
            }
            X::prefetch(at[range]);
            at[range] += kLine;
            --lines;
        }
    }
};

// A page's scales as floats; slots that hold no token have all zeros.
struct QuantPage {
    const Record* record;
    PageView view;
    Prefetcher* ahead;
    float* scale;               // [groups, 64]
    float* zero;                // [groups, 64] what unsigned code 0 stands for
    float* centre;              // [groups, 64] what code 8 stands for (int4)
    float* share;               // [groups, 64] scale / largest scale of the group
    float* largest;             // [groups]
    float *pe_scale, *pe_zero;  // [rope_groups, 64]
    bool has_zero;
};

// What every dot does to a page's scales and a task's queries first.
template <class X>
struct QuantState {
    using F = typename X::F;

    static void load_page(QuantPage& page, int valid) {
        const Record& record = *page.record;
        Decoder<X>::load_columns(page.view.pe_scale, record.rope_groups, valid, page.pe_scale);
        for (int i = 0; i < record.rope_groups * kPageTokens; i += 16)
            X::store(page.pe_zero + i, X::mul(X::set(-128), X::load(page.pe_scale + i)));
        const bool int4 = record.format == CacheFormat::kInt4;
        Decoder<X>::load_columns(page.view.scale, record.groups, valid, page.scale);
        if (int4) Decoder<X>::load_columns(page.view.zero, record.groups, valid, page.zero);
        page.has_zero = int4 || X::kUnsignedCodes;
        for (int g = 0; g < record.groups; ++g) {
            F largest = X::set(0);
            for (int t = 0; t < kPageTokens; t += 16) {
                const int at = g * kPageTokens + t;
                const F scale = X::load(page.scale + at);
                largest = X::max(largest, scale);
                if (int4)
                    X::store(page.centre + at, X::fma(X::set(8), scale, X::load(page.zero + at)));
                else if (X::kUnsignedCodes)
                    X::store(page.zero + at, X::mul(X::set(-128), scale));
            }
            page.largest[g] = X::highest(largest);
            const F inverse = X::set(page.largest[g] > kTiny ? 1.0f / page.largest[g] : 0.0f);
            for (int t = 0; t < kPageTokens; t += 16) {
                const int at = g * kPageTokens + t;
                X::store(page.share + at, X::mul(X::load(page.scale + at), inverse));
            }
        }
    }

    static void quantize_queries(const Record& record, const float* q, QuantRows& rows) {
        const float top = rows.planes == 1 ? 127 : 127 * kPlaneStep;
        for (int r = 0; r < rows.rows; ++r)
            for (int g = 0; g < record.groups; ++g) {
                const int64_t at = int64_t{r} * record.rank + g * record.group;
                F lanes = X::set(0);
                for (int i = 0; i < record.group; i += 16)
                    lanes = X::max(lanes, X::abs(X::load(q + at + i)));
                const float largest = X::highest(lanes);
                const F inverse = X::set(largest > kTiny ? top / largest : 0.0f);
                F sum = X::set(0);
                for (int i = 0; i < record.group; i += 16) {
                    const F code = X::round(X::mul(X::load(q + at + i), inverse));
                    sum = X::add(sum, code);
                    if (rows.planes == 1) {
                        X::store_signed_bytes(rows.q[0] + at + i, code);
                        continue;
                    }
                    const F high = X::round(X::mul(code, X::set(1 / kPlaneStep)));
                    X::store_signed_bytes(rows.q[0] + at + i, high);
                    X::store_signed_bytes(rows.q[1] + at + i,
                                          X::fma(high, X::set(-kPlaneStep), code));
                }
                const float scale = largest / top;
                rows.q_scale[r * record.groups + g] = scale;
                rows.q_sum[r * record.groups + g] = scale * X::sum(sum);
            }
    }
};

}  // namespace
}  // namespace mla::cpu
