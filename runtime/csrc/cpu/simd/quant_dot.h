// Scores and values of int4 and int8 pages by byte dots of vectors; the arithmetic is explained in
// quant_state.h.
#pragma once

#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd/quant_state.h"

namespace mla::cpu {
namespace {

// Own: a dot that derives from this one with tiles, and an order of the lines' bytes, of its own
// (i8mm_dot.h).
template <class X, class Own = void>
struct QuantDot : QuantState<X> {
    using F = typename X::F;
    using I = typename X::I;
    using Self = std::conditional_t<std::is_void_v<Own>, QuantDot, Own>;

    template <int P, int R, int C>
    static void clear(I (&sums)[P][R][C]) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c) sums[p][r][c] = X::zero();
    }

    template <int P, int R, int C>
    static void add_pairs(I (&sums)[P][R][C], const I (&pairs)[P][R][C]) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
                for (int c = 0; c < C; ++c)
                    sums[p][r][c] = X::add_pairs(sums[p][r][c], pairs[p][r][c]);
    }

    // ---- scores -----------------------------------------------------------------------------

    // Codes as lines of 16 tokens x 4 channels, in the kind that the dot takes.
    static void flip_lines(const uint8_t* from, int lines, uint8_t* to) {
        const I flip = X::set_byte(X::kUnsignedCodes ? 0x80 : 0);
        for (int k = 0; k < lines; ++k)
            X::store(static_cast<void*>(to + k * kLine),
                     X::xor_(X::load(static_cast<const void*>(from + k * kLine)), flip));
    }

    static void unpack_group(const Record& record, const uint8_t* from, uint8_t* to) {
        if (record.format != CacheFormat::kInt4) return flip_lines(from, record.group / 4, to);
        for (int k = 0; k < record.group / 8; ++k) {
            const I line = X::load(static_cast<const void*>(from + k * kLine));
            X::store(static_cast<void*>(to + 2 * k * kLine), X::low_nibbles(line));
            X::store(static_cast<void*>(to + (2 * k + 1) * kLine), X::high_nibbles(line));
        }
    }

    static int lines_per_group(const Record& record) {
        return record.group / (record.format == CacheFormat::kInt4 ? 8 : 4);
    }

    // A group of channels of T x 16 tokens against all rows.
    struct ScoreGroup {
        const int8_t* q[kMaxPlanes];  // [rows, q_stride]
        int64_t q_stride;
        const uint8_t* codes;  // T blocks of `lines` lines, block_stride bytes apart
        int64_t block_stride;
        int lines;
        const float *scale, *zero;         // [16 T]; zero may be null
        const float *row_scale, *row_sum;  // [rows, row_stride]
        int64_t row_stride;
    };

    // Nibbles: codes are 0 to 15, else bytes of the kind kUnsignedCodes says.
    template <int R, int T, int Planes, bool Nibbles>
    static void score_tile(const ScoreGroup& g, int row, float* scores) {
        I sums[Planes][R][T];
        clear(sums);
        const auto add = [&](I(&to)[Planes][R][T], int from, int end,
                             const auto& dot) __attribute__((always_inline)) {
#pragma GCC unroll 1  // else the sums of a few steps are spilled
            for (int k = from; k < end; ++k) {
                I line[T];
#pragma GCC unroll 2
                for (int t = 0; t < T; ++t)
                    line[t] =
                        X::load(static_cast<const void*>(g.codes + t * g.block_stride + k * kLine));
#pragma GCC unroll 2
                for (int p = 0; p < Planes; ++p)
#pragma GCC unroll 8
                    for (int r = 0; r < R; ++r) {
                        const I query = X::broadcast_dword(g.q[p] + (row + r) * g.q_stride + 4 * k);
#pragma GCC unroll 2
                        for (int t = 0; t < T; ++t) to[p][r][t] = dot(to[p][r][t], line[t], query);
                    }
            }
        };
        if constexpr (!Nibbles) {
            add(sums, 0, g.lines, [](I x, I y, I z) { return X::dot_int8(x, y, z); });
        } else if constexpr (X::kPairSteps == 0) {
            add(sums, 0, g.lines, [](I x, I y, I z) { return X::dot_int4(x, y, z); });
        } else {
            for (int k = 0; k < g.lines; k += X::kPairSteps) {
                I pairs[Planes][R][T];
                clear(pairs);
                add(pairs, k, k + X::kPairSteps,
                    [](I x, I y, I z) { return X::dot_pairs(x, y, z); });
                add_pairs(sums, pairs);
            }
        }
        fold_scores(sums, g, row, scores);
    }

    // The first plane's sums are the high ones.
    template <int Planes>
    static I join_planes(const I& first, const I& last) {
        if constexpr (Planes == 1)
            return first;
        else
            return X::add_dwords(X::template shift_left_dwords<7>(first), last);
    }

    // scores += the group's sums in the units of their tokens and rows.
    template <int R, int T, int Planes>
    [[gnu::always_inline]] static void fold_scores(const I (&sums)[Planes][R][T],
                                                   const ScoreGroup& g, int row, float* scores) {
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) {
            const F scale = X::load(g.scale + 16 * t);
            const F zero = g.zero ? X::load(g.zero + 16 * t) : X::set(0);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const I sum = join_planes<Planes>(sums[0][r][t], sums[Planes - 1][r][t]);
                float* score = scores + r * kPageTokens + 16 * t;
                const int64_t at = (row + r) * g.row_stride;
                F x = X::load(score);
                x = X::fma(X::mul(X::to_float(sum), X::set(g.row_scale[at])), scale, x);
                if (g.zero) x = X::fma(zero, X::set(g.row_sum[at]), x);
                X::store(score, x);
            }
        }
    }

    template <int R, int T, int Planes, bool Nibbles>
    static void score_rows(const ScoreGroup& g, int rows, int row, float* scores) {
        if constexpr (R > 1) {
            if (rows < R) return score_rows<R - 1, T, Planes, Nibbles>(g, rows, row, scores);
        }
        Self::template score_tile<R, T, Planes, Nibbles>(g, row, scores);
    }

    // scores: of the group's first token.
    template <int T, bool Nibbles>
    static void score_group(const ScoreGroup& g, const QuantRows& rows, float* scores) {
        constexpr int R1 = X::kScoreRows, R2 = R1 / 2;
        const int step = rows.planes == 1 ? R1 : R2;
        for (int row = 0; row < rows.rows; row += step) {
            const int count = rows.rows - row < step ? rows.rows - row : step;
            // Codes in nibbles come with one plane.
            if (rows.planes == 1)
                score_rows<R1, T, 1, Nibbles>(g, count, row, scores + row * kPageTokens);
            else
                score_rows<R2, T, 2, false>(g, count, row, scores + row * kPageTokens);
        }
    }

    struct Buffers {
        uint8_t* lines;            // T blocks of a group, or a group's values transposed
        uint8_t* p;                // probabilities of a few rows
        int8_t* q_pe[kMaxPlanes];  // [rows, R]
        float *pe_scale, *pe_sum;  // [rows, rope_groups]
        size_t bytes;
    };

    static Buffers lay_out(uint8_t* memory, const Record& record, int rows) {
        Buffers b = {};
        const auto take = [&](int64_t bytes) {
            uint8_t* at = memory ? memory + b.bytes : nullptr;
            b.bytes += static_cast<size_t>((bytes + 63) / 64 * 64);
            return at;
        };
        b.lines = take(kPageTokens * 64);
        b.p = take(int64_t{kMaxPlanes} * X::kValueRows * kPageTokens);
        for (auto& plane : b.q_pe)
            plane = reinterpret_cast<int8_t*>(take(int64_t{rows} * record.rope));
        b.pe_scale = reinterpret_cast<float*>(take(int64_t{4} * rows * record.rope_groups));
        b.pe_sum = reinterpret_cast<float*>(take(int64_t{4} * rows * record.rope_groups));
        return b;
    }

    static size_t scratch_bytes(const Record& record, int rows) {
        return lay_out(nullptr, record, rows).bytes;
    }

    static void begin(const Record& record, const QuantRows& rows, const float* q_pe,
                      uint8_t* scratch) {
        const Buffers b = lay_out(scratch, record, rows.rows);
        const float top = rows.planes == 1 ? 127 : 127 * kPlaneStep;
        for (int i = 0; i < rows.rows * record.rope_groups; ++i) {
            const float* q = q_pe + int64_t{i} * record.rope_group;
            float largest = 0, sum = 0;
            for (int j = 0; j < record.rope_group; ++j) {
                const float size = __builtin_fabsf(q[j]);
                if (size > largest) largest = size;
            }
            const float inverse = largest > kTiny ? top / largest : 0;
            for (int j = 0; j < record.rope_group; ++j) {
                const float code = __builtin_rintf(q[j] * inverse);
                const float high = rows.planes == 1 ? code : __builtin_rintf(code / kPlaneStep);
                sum += code;
                b.q_pe[0][i * record.rope_group + j] = static_cast<int8_t>(high);
                b.q_pe[1][i * record.rope_group + j] =
                    static_cast<int8_t>(code - high * kPlaneStep);
            }
            b.pe_scale[i] = largest / top;
            b.pe_sum[i] = largest / top * sum;
        }
    }
    static void end() {}

    static void score_rope(const QuantRows& rows, const QuantPage& page, uint8_t* scratch) {
        const Record& record = *page.record;
        const Buffers b = lay_out(scratch, record, rows.rows);
        constexpr int T = X::kScoreBlocks;
        const int lines = record.rope / 4;
        for (int block = 0; block < kBlocks; block += T) {
            for (int t = 0; t < T; ++t)
                Self::flip_lines(reinterpret_cast<const uint8_t*>(page.view.pe_codes) +
                                     int64_t{block + t} * lines * kLine,
                                 lines, b.lines + int64_t{t} * lines * kLine);
            for (int g = 0; g < record.rope_groups; ++g) {
                const int at = g * kPageTokens + block * kBlockTokens;
                const int first = g * record.rope_group;
                const ScoreGroup group = {{b.q_pe[0] + first, b.q_pe[1] + first},
                                          record.rope,
                                          b.lines + int64_t{first} / 4 * kLine,
                                          int64_t{lines} * kLine,
                                          record.rope_group / 4,
                                          page.pe_scale + at,
                                          X::kUnsignedCodes ? page.pe_zero + at : nullptr,
                                          b.pe_scale + g,
                                          b.pe_sum + g,
                                          record.rope_groups};
                score_group<T, false>(group, rows, rows.scores + block * kBlockTokens);
            }
        }
    }

    static void add_scores(const QuantRows& rows, const QuantPage& page, uint8_t* scratch) {
        const Record& record = *page.record;
        const Buffers b = lay_out(scratch, record, rows.rows);
        constexpr int T = X::kScoreBlocks;
        const int lines = lines_per_group(record);
        for (int i = 0; i < rows.rows * kPageTokens; i += 16) X::store(rows.scores + i, X::set(0));
        Self::score_rope(rows, page, scratch);
        const int64_t block_bytes = int64_t{record.groups} * lines * kLine;
        const int64_t unpacked = int64_t{record.group} / 4 * kLine;
        for (int block = 0; block < kBlocks; block += T)
            for (int g = 0; g < record.groups; ++g) {
                page.ahead->template fetch<X>(T * lines);
                for (int t = 0; t < T; ++t)
                    Self::unpack_group(
                        record,
                        page.view.codes + (block + t) * block_bytes + int64_t{g} * lines * kLine,
                        b.lines + t * unpacked);
                const int at = g * kPageTokens + block * kBlockTokens;
                const int first = g * record.group;
                const ScoreGroup group = {{rows.q[0] + first, rows.q[1] + first},
                                          record.rank,
                                          b.lines,
                                          unpacked,
                                          record.group / 4,
                                          page.scale + at,
                                          page.has_zero ? page.zero + at : nullptr,
                                          rows.q_scale + g,
                                          rows.q_sum + g,
                                          record.groups};
                score_group<T, true>(group, rows, rows.scores + block * kBlockTokens);
            }
    }

    // ---- values -----------------------------------------------------------------------------

    // Four lines of 16 tokens x 4 columns to four lines of 16 columns x 4 tokens.
    static void transpose_quads(I (&x)[4]) { X::transpose_quads(x); }

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
                Self::transpose_quads(x);
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
        clear(sums);
        const auto add = [&](I(&to)[Planes][R][C], int from, int end,
                             const auto& dot) __attribute__((always_inline)) {
#pragma GCC unroll 1
            for (int quad = from; quad < end; ++quad) {
                I codes[C];
#pragma GCC unroll 4
                for (int j = 0; j < C; ++j)
                    codes[j] =
                        X::load(static_cast<const void*>(values + quad * quad_stride + j * kLine));
#pragma GCC unroll 2
                for (int n = 0; n < Planes; ++n)
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        const I x =
                            X::broadcast_dword(p + n * plane_stride + r * p_stride + 4 * quad);
#pragma GCC unroll 4
                        for (int j = 0; j < C; ++j) to[n][r][j] = dot(to[n][r][j], x, codes[j]);
                    }
            }
        };
        constexpr int kQuads = kPageTokens / 4;
        if constexpr (Planes == 2 || X::kPairSteps == 0) {
            add(sums, 0, kQuads, [](I x, I y, I z) { return X::dot_values(x, y, z); });
        } else {  // one plane: the codes are centred nibbles
            for (int quad = 0; quad < kQuads; quad += X::kPairSteps) {
                I pairs[Planes][R][C];
                clear(pairs);
                add(pairs, quad, quad + X::kPairSteps,
                    [](I x, I y, I z) { return X::dot_pairs(x, y, z); });
                add_pairs(sums, pairs);
            }
        }
        fold_values(sums, factor, o, o_stride);
    }

    template <int R, int C, int Planes>
    [[gnu::always_inline]] static void fold_values(const I (&sums)[Planes][R][C],
                                                   const float* factor, float* o,
                                                   int64_t o_stride) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                const I sum = join_planes<Planes>(sums[0][r][j], sums[Planes - 1][r][j]);
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
            Self::template value_tile<R, C, Planes>(factor, o + 16 * j, o_stride,
                                                    values + j * kLine, int64_t{columns} * kLine, p,
                                                    kPageTokens, plane_stride);
        for (; j < columns; ++j)
            Self::template value_tile<R, 1, Planes>(factor, o + 16 * j, o_stride,
                                                    values + j * kLine, int64_t{columns} * kLine, p,
                                                    kPageTokens, plane_stride);
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
        const Buffers b = lay_out(scratch, record, rows.rows);
        uint8_t* p = b.p;
        constexpr int64_t plane_stride = int64_t{R1} * kPageTokens;
        for (int g = 0; g < record.groups; ++g) {
            page.ahead->template fetch<X>(2 * lines_per_group(record));
            transpose_group(record, page.view.codes, g, b.lines);
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
};

}  // namespace
}  // namespace mla::cpu
