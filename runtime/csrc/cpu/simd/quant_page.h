// Scores and values straight from the codes of an int4 or int8 page.
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
    int8_t* q[kMaxPlanes];  // [rows up to a multiple of 16, D]
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
    float* scale;     // [groups, 64]
    float* zero;      // [groups, 64] what unsigned code 0 stands for
    float* centre;    // [groups, 64] what code 8 stands for (int4)
    float* share;     // [groups, 64] scale / largest scale of the group
    float* largest;   // [groups]
    float* pe_scale;  // [rope_groups, 64]
    bool has_zero;
};

template <class X>
struct QuantDot {
    using F = typename X::F;
    using I = typename X::I;

    // ---- preparation ------------------------------------------------------------------------

    static void load_page(QuantPage& page, int valid) {
        const Record& record = *page.record;
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

    // ---- scores -----------------------------------------------------------------------------

    // One group of 16 tokens as lines of 16 tokens x 4 channels, in the dot's kind of code.
    // Returns how many lines of the cache were read from `from`.
    static void unpack_group(const Record& record, const uint8_t* from, uint8_t* to) {
        if (record.format == CacheFormat::kInt4) {
            for (int k = 0; k < record.group / 8; ++k) {
                const I line = X::load(static_cast<const void*>(from + k * kLine));
                X::store(static_cast<void*>(to + 2 * k * kLine), X::low_nibbles(line));
                X::store(static_cast<void*>(to + (2 * k + 1) * kLine), X::high_nibbles(line));
            }
            return;
        }
        const I flip = X::set_byte(X::kUnsignedCodes ? 0x80 : 0);
        for (int k = 0; k < record.group / 4; ++k)
            X::store(static_cast<void*>(to + k * kLine),
                     X::xor_(X::load(static_cast<const void*>(from + k * kLine)), flip));
    }

    static int lines_per_group(const Record& record) {
        return record.group / (record.format == CacheFormat::kInt4 ? 8 : 4);
    }

    template <int R, int Planes>
    static void score_tile(const QuantRows& rows, const QuantPage& page, int row, int g, int t,
                           const uint8_t* codes) {
        const Record& record = *page.record;
        I sums[Planes][R];
#pragma GCC unroll 8
        for (int p = 0; p < Planes; ++p)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) sums[p][r] = X::zero();
        const int64_t at = int64_t{row} * record.rank + g * record.group;
        for (int k = 0; k < record.group / 4; ++k) {
            const I line = X::load(static_cast<const void*>(codes + k * kLine));
#pragma GCC unroll 8
            for (int p = 0; p < Planes; ++p)
#pragma GCC unroll 8
                for (int r = 0; r < R; ++r) {
                    const I query = X::broadcast_dword(rows.q[p] + at + r * record.rank + 4 * k);
                    sums[p][r] = Planes == 1 ? X::dot_int4(sums[p][r], line, query)
                                             : X::dot_int8(sums[p][r], line, query);
                }
        }
        const F scale = X::load(page.scale + g * kPageTokens + t);
        const F zero = page.has_zero ? X::load(page.zero + g * kPageTokens + t) : X::set(0);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            I sum = sums[0][r];
            if constexpr (Planes == 2)
                sum = X::add_dwords(X::template shift_left_dwords<7>(sum), sums[1][r]);
            float* score = rows.scores + (row + r) * kPageTokens + t;
            const int at_group = (row + r) * record.groups + g;
            F x = X::load(score);
            x = X::fma(X::mul(X::to_float(sum), X::set(rows.q_scale[at_group])), scale, x);
            if (page.has_zero) x = X::fma(zero, X::set(rows.q_sum[at_group]), x);
            X::store(score, x);
        }
    }

    template <int R, int Planes>
    static void score_strip(int count, const QuantRows& rows, const QuantPage& page, int row, int g,
                            int t, const uint8_t* codes) {
        if constexpr (R > 1) {
            if (count < R) return score_strip<R - 1, Planes>(count, rows, page, row, g, t, codes);
        }
        score_tile<R, Planes>(rows, page, row, g, t, codes);
    }

    // Adds the latent part to rows.scores.
    static void add_scores(const QuantRows& rows, const QuantPage& page, uint8_t* scratch) {
        const Record& record = *page.record;
        const int lines = lines_per_group(record);
        constexpr int R1 = X::kScoreRows, R2 = X::kScoreRows / 2;
        int64_t at = 0;
        for (int t = 0; t < kPageTokens; t += kBlockTokens)
            for (int g = 0; g < record.groups; ++g) {
                page.ahead->template fetch<X>(2 * lines);
                unpack_group(record, page.view.codes + at, scratch);
                at += int64_t{lines} * kLine;
                if (rows.planes == 1)
                    for (int r = 0; r < rows.rows; r += R1)
                        score_strip<R1, 1>(rows.rows - r < R1 ? rows.rows - r : R1, rows, page, r,
                                           g, t, scratch);
                else
                    for (int r = 0; r < rows.rows; r += R2)
                        score_strip<R2, 2>(rows.rows - r < R2 ? rows.rows - r : R2, rows, page, r,
                                           g, t, scratch);
            }
    }

    // ---- values -----------------------------------------------------------------------------

    // One group of a page as [16 token quads][group / 16][16 columns][4 tokens] signed bytes.
    static void transpose_group(const Record& record, const uint8_t* codes, int g, uint8_t* to) {
        const bool int4 = record.format == CacheFormat::kInt4;
        const int lines = lines_per_group(record), columns = record.group / 16;
        const int64_t block_bytes = int64_t{lines} * record.groups * kLine;
        for (int block = 0; block < kBlocks; ++block) {
            const uint8_t* from = codes + block * block_bytes + int64_t{g} * lines * kLine;
            for (int k = 0; k < lines; k += 4) {
                I x[4];
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i)
                    x[i] = X::load(static_cast<const void*>(from + (k + i) * kLine));
                X::transpose_quads(x);
                uint8_t* at = to + (int64_t{block} * 4 * columns + k / 4 * (int4 ? 2 : 1)) * kLine;
#pragma GCC unroll 4
                for (int q = 0; q < 4; ++q, at += columns * kLine) {
                    if (int4) {
                        X::store(static_cast<void*>(at), X::centred_low(x[q]));
                        X::store(static_cast<void*>(at + kLine), X::centred_high(x[q]));
                    } else {
                        X::store(static_cast<void*>(at), x[q]);
                    }
                }
            }
        }
    }

    static float probability_levels(int planes) {
        return planes == 1 ? X::kMaxProbability : 127 * kPlaneStep + 127;
    }

    // p * share in `planes` of bytes [64] each.
    static void quantize_probabilities(const float* p, const float* share, int planes,
                                       uint8_t* codes, int64_t plane_stride) {
        const F levels = X::set(probability_levels(planes));
        for (int t = 0; t < kPageTokens; t += 16) {
            F x = X::mul(X::mul(X::load(p + t), levels), X::load(share + t));
            if (planes == 1) {
                X::store_bytes(codes + t, x);
                continue;
            }
            x = X::round(x);
            // floor(x / 128), the remainder is 0 to 127
            const F high = X::round(X::mul(X::sub(x, X::set(63.5f)), X::set(1 / kPlaneStep)));
            X::store_bytes(codes + t, high);
            X::store_bytes(codes + plane_stride + t, X::fma(high, X::set(-kPlaneStep), x));
        }
    }

    template <int R, int C, int Planes>
    static void value_tile(const float* factor, float* o, int64_t o_stride, const uint8_t* values,
                           int64_t quad_stride, const uint8_t* p, int64_t p_stride,
                           int64_t plane_stride) {
        I sums[Planes][R][C];
#pragma GCC unroll 2
        for (int n = 0; n < Planes; ++n)
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j) sums[n][r][j] = X::zero();
        for (int quad = 0; quad < kPageTokens / 4; ++quad) {
            I codes[C];
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j)
                codes[j] =
                    X::load(static_cast<const void*>(values + quad * quad_stride + j * kLine));
#pragma GCC unroll 2
            for (int n = 0; n < Planes; ++n)
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    const I x = X::broadcast_dword(p + n * plane_stride + r * p_stride + 4 * quad);
#pragma GCC unroll 4
                    for (int j = 0; j < C; ++j)
                        sums[n][r][j] = X::dot_values(sums[n][r][j], x, codes[j]);
                }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                I sum = sums[0][r][j];
                if constexpr (Planes == 2)
                    sum = X::add_dwords(X::template shift_left_dwords<7>(sum), sums[1][r][j]);
                float* to = o + r * o_stride + 16 * j;
                X::store(to, X::fma(X::to_float(sum), X::set(factor[r]), X::load(to)));
            }
    }

    template <int R, int C, int Planes>
    static void value_strip(int count, const float* factor, float* o, int64_t o_stride, int columns,
                            const uint8_t* values, const uint8_t* p, int64_t plane_stride) {
        if constexpr (R > 1) {
            if (count < R)
                return value_strip<R - 1, C, Planes>(count, factor, o, o_stride, columns, values, p,
                                                     plane_stride);
        }
        int j = 0;
        for (; j + C <= columns; j += C)
            value_tile<R, C, Planes>(factor, o + 16 * j, o_stride, values + j * kLine,
                                     int64_t{columns} * kLine, p, kPageTokens, plane_stride);
        for (; j < columns; ++j)
            value_tile<R, 1, Planes>(factor, o + 16 * j, o_stride, values + j * kLine,
                                     int64_t{columns} * kLine, p, kPageTokens, plane_stride);
    }

    // What a sum of p_code * code is multiplied by, less rows.beta and page.largest.
    static float value_unit(const Record& record, int planes) {
        const float centre = record.format == CacheFormat::kInt4 ? X::kCentreScale : 1;
        return 1.0f / (probability_levels(planes) * centre);
    }

    // o += beta * (probabilities times codes).
    static void add_values(const QuantRows& rows, const QuantPage& page, uint8_t* scratch) {
        const Record& record = *page.record;
        constexpr int R1 = X::kValueRows, R2 = X::kValueRows > 1 ? X::kValueRows / 2 : 1;
        const float unit = value_unit(record, rows.planes);
        uint8_t* p = scratch + kPageTokens * 64;
        constexpr int64_t plane_stride = int64_t{R1} * kPageTokens;
        for (int g = 0; g < record.groups; ++g) {
            transpose_group(record, page.view.codes, g, scratch);
            const int step = rows.planes == 1 ? R1 : R2;
            for (int row = 0; row < rows.rows; row += step) {
                const int count = rows.rows - row < step ? rows.rows - row : step;
                float factor[R1];
                for (int r = 0; r < count; ++r) {
                    quantize_probabilities(rows.scores + (row + r) * kPageTokens,
                                           page.share + g * kPageTokens, rows.planes,
                                           p + r * kPageTokens, plane_stride);
                    factor[r] = rows.beta[row + r] * page.largest[g] * unit;
                }
                float* o = rows.o_at(row, g, record.group);
                if (rows.planes == 1)
                    value_strip<R1, X::kValueColumns, 1>(count, factor, o, record.group,
                                                         record.group / 16, scratch, p,
                                                         plane_stride);
                else
                    value_strip<R2, X::kValueColumns, 2>(count, factor, o, record.group,
                                                         record.group / 16, scratch, p,
                                                         plane_stride);
            }
        }
    }

    // Bytes of scratch: lines of a group, then probabilities of a few rows.
    static size_t scratch_bytes(const Record&, int) {
        return kPageTokens * 64 + kMaxPlanes * 16 * kPageTokens;
    }

    static constexpr bool kScoresRope = false;  // add_scores finds the rope part in the scores
    static void begin(const Record&, const QuantRows&, const float*, uint8_t*) {}
    static void end() {}
};

}  // namespace
}  // namespace mla::cpu
