// Scores and values of int4 and int8 pages by smmla: two rows by two columns at a depth of eight
// bytes, twice the products of sdot. The sums are the same integers, so that every bit of a result
// is sdot's.
//
// Two neighbouring lines of 16 columns x 4 of depth (scores: tokens and channels; values: channels
// and tokens) become eight pairs of columns x 8 of depth; with them in pairs both products are one.
#pragma once

#include "cpu/simd/quant_dot.h"
#include "cpu/simd/vector_neon.h"

namespace mla::cpu {
namespace {

struct NeonI8mm : Neon {
    // 16 sums of 2 x 2: four rows, or two in two planes, by 16 columns.
    static constexpr int kValueRows = 4;
    static constexpr int kValueColumns = 1;
};

struct I8mmDot : QuantDot<NeonI8mm, I8mmDot> {
    using X = NeonI8mm;
    using Narrow = QuantDot<X>;  // by sdot, a line at a time
    using Wide = QuantDot<X, I8mmDot>;
    static constexpr int kStep = 16;  // bytes of depth: four lines

    // a: columns 0 to 7 of both lines, b: 8 to 15; a register holds two columns.
    static void pair_lines(I& a, I& b) {
        const auto half = [&](int from) {
            I to;
            for (int i = 0; i < 2; ++i) {
                const int32x4_t x = X::dwords(a.v[from + i]), y = X::dwords(b.v[from + i]);
                to.v[2 * i] = X::as_bytes(vzip1q_s32(x, y));
                to.v[2 * i + 1] = X::as_bytes(vzip2q_s32(x, y));
            }
            return to;
        };
        const I low = half(0), high = half(2);
        a = low;
        b = high;
    }

    static void store_pair(I a, I b, uint8_t* to) {
        pair_lines(a, b);
        X::store(static_cast<void*>(to), a);
        X::store(static_cast<void*>(to + kLine), b);
    }

    static void flip_lines(const uint8_t* from, int lines, uint8_t* to) {
        for (int k = 0; k < lines; k += 2)
            store_pair(X::load(static_cast<const void*>(from + k * kLine)),
                       X::load(static_cast<const void*>(from + (k + 1) * kLine)), to + k * kLine);
    }

    static void unpack_group(const Record& record, const uint8_t* from, uint8_t* to) {
        if (record.format != CacheFormat::kInt4) return flip_lines(from, record.group / 4, to);
        for (int k = 0; k < record.group / 8; ++k) {
            const I line = X::load(static_cast<const void*>(from + k * kLine));
            store_pair(X::low_nibbles(line), X::high_nibbles(line), to + 2 * k * kLine);
        }
    }

    static void transpose_quads(I (&x)[4]) {
        X::transpose_quads(x);
        pair_lines(x[0], x[1]);
        pair_lines(x[2], x[3]);
    }

    // Rows of `lines` / 4 steps of depth, row_stride and plane_stride bytes apart, times paired
    // lines that are line_stride bytes apart.
    template <int R, int Planes>
    [[gnu::always_inline]] static void multiply(const int8_t* const (&planes)[Planes],
                                                int64_t row_stride, const uint8_t* columns,
                                                int64_t line_stride, int lines,
                                                I (&sums)[Planes][R][1]) {
        constexpr int kPairs = (R + 1) / 2;
        int32x4_t tiles[Planes][kPairs][8];
#pragma GCC unroll 2
        for (int n = 0; n < Planes; ++n)
#pragma GCC unroll 2
            for (int i = 0; i < kPairs; ++i)
#pragma GCC unroll 8
                for (int j = 0; j < 8; ++j) tiles[n][i][j] = vdupq_n_s32(0);
#pragma GCC unroll 1
        for (int k = 0; k < lines; k += 4) {
            int8x16_t rows[Planes][kPairs][2];
#pragma GCC unroll 2
            for (int n = 0; n < Planes; ++n)
#pragma GCC unroll 2
                for (int i = 0; i < kPairs; ++i) {
                    const int8_t* even = planes[n] + 2 * i * row_stride + 4 * k;
                    // The last of an odd number of rows is its own partner.
                    const int8_t* odd = 2 * i + 1 < R ? even + row_stride : even;
                    const int64x2_t x = vreinterpretq_s64_s8(vld1q_s8(even));
                    const int64x2_t y = vreinterpretq_s64_s8(vld1q_s8(odd));
                    rows[n][i][0] = vreinterpretq_s8_s64(vzip1q_s64(x, y));
                    rows[n][i][1] = vreinterpretq_s8_s64(vzip2q_s64(x, y));
                }
#pragma GCC unroll 4
            for (int line = 0; line < 4; ++line) {
                const I pairs =
                    X::load(static_cast<const void*>(columns + (k + line) * line_stride));
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
#pragma GCC unroll 2
                    for (int n = 0; n < Planes; ++n)
#pragma GCC unroll 2
                        for (int i = 0; i < kPairs; ++i) {
                            int32x4_t& tile = tiles[n][i][line % 2 * 4 + j];
                            tile = vmmlaq_s32(tile, rows[n][i][line / 2], pairs.v[j]);
                        }
            }
        }
#pragma GCC unroll 2
        for (int n = 0; n < Planes; ++n)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j) {
                    const int64x2_t x = vreinterpretq_s64_s32(tiles[n][r / 2][2 * j]);
                    const int64x2_t y = vreinterpretq_s64_s32(tiles[n][r / 2][2 * j + 1]);
                    sums[n][r][0].v[j] =
                        vreinterpretq_s8_s64(r % 2 ? vzip2q_s64(x, y) : vzip1q_s64(x, y));
                }
    }

    template <int R, int T, int Planes, bool Nibbles>
    static void score_tile(const ScoreGroup& g, int row, float* scores) {
        static_assert(T == 1);
        const int8_t* planes[Planes];
        for (int n = 0; n < Planes; ++n) planes[n] = g.q[n] + row * g.q_stride;
        I sums[Planes][R][1];
        multiply<R, Planes>(planes, g.q_stride, g.codes, kLine, g.lines, sums);
        fold_scores(sums, g, row, scores);
    }

    static void score_rope(const QuantRows& rows, const QuantPage& page, uint8_t* scratch) {
        // A group below a step (qk_rope_head_dim no multiple of 16) is too narrow.
        if (page.record->rope_group < kStep) return Narrow::score_rope(rows, page, scratch);
        Wide::score_rope(rows, page, scratch);
    }

    template <int R, int C, int Planes>
    static void value_tile(const float* factor, float* o, int64_t o_stride, const uint8_t* values,
                           int64_t quad_stride, const uint8_t* p, int64_t p_stride,
                           int64_t plane_stride) {
        static_assert(C == 1);
        const int8_t* planes[Planes];
        for (int n = 0; n < Planes; ++n)
            planes[n] = reinterpret_cast<const int8_t*>(p + n * plane_stride);
        I sums[Planes][R][1];
        multiply<R, Planes>(planes, p_stride, values, quad_stride, kPageTokens / 4, sums);
        fold_values(sums, factor, o, o_stride);
    }
};

}  // namespace
}  // namespace mla::cpu
