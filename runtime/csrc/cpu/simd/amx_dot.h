// Tiles: 16 rows of queries or probabilities (A) by 16 tokens or channels (B) at a time.
//
// A TDP takes as many cycles as A has rows, so rows are spread evenly over the tiles they need. The
// cache's blocked lines are rows of B as they are: a group of 64 channels is one step of depth 64.
// The intrinsics want literal tile numbers, hence the repetition.
#pragma once

#include <immintrin.h>

#include "cpu/simd/quant_dot.h"
#include "cpu/simd/tile_config.h"
#include "cpu/simd/vector_avx512.h"

namespace mla::cpu {
namespace {

// Scores and values of int4 and int8 pages, the rope part included.
struct AmxDot {
    using X = Avx512;
    static constexpr int kTileBytes = 1024;

    struct Buffers {
        uint8_t* lines;  // a block's groups in the dot's codes, or a group's transposed values
        uint8_t* rope;   // [4][rope lines padded] when the page's own cannot be read in whole steps
        int32_t* c;      // 4 tiles: two are read while the other two are written
        uint8_t* p;      // [planes][rows][64]
        uint8_t* p15;    // [rows][2][32] int16, see store_p15
        uint8_t* share15;  // [groups][2][32] int16
        int8_t* q_pe;      // [planes][rope_groups][rows][group]: zero but for the rope group's
        float* pe_scale;   // [rows][rope_groups]
        size_t bytes;
    };

    static int tiles(int rows) { return (rows + 15) / 16; }
    static int tile_rows(int rows) { return (rows + tiles(rows) - 1) / tiles(rows); }
    static int rope_lines(const Record& r) {  // a block's, in whole steps
        return (r.rope + r.group - 1) / r.group * r.group / 4;
    }

    static Buffers lay_out(uint8_t* memory, const Record& record, int rows) {
        Buffers b = {};
        const auto take = [&](int64_t bytes) {
            uint8_t* at = memory ? memory + b.bytes : nullptr;
            b.bytes += static_cast<size_t>((bytes + 63) / 64 * 64);
            return at;
        };
        const int64_t all = (rows + 15) / 16 * 16;
        const int64_t block = int64_t{record.rank} * kBlockTokens;
        b.lines = take(block > kPageTokens * 64 ? block : kPageTokens * 64);
        b.rope = take(int64_t{kBlocks} * rope_lines(record) * kLine);
        b.c = reinterpret_cast<int32_t*>(take(4 * kTileBytes));
        b.p = take(kMaxPlanes * all * kPageTokens);
        b.p15 = take(2 * all * kPageTokens);
        b.share15 = take(int64_t{2} * record.groups * kPageTokens);
        b.q_pe =
            reinterpret_cast<int8_t*>(take(kMaxPlanes * record.rope_groups * all * record.group));
        b.pe_scale = reinterpret_cast<float*>(take(4 * all * record.rope_groups));
        return b;
    }

    static size_t scratch_bytes(const Record& record, int rows) {
        return lay_out(nullptr, record, rows).bytes;
    }

    static int64_t q_pe_plane(const Record& record, int rows) {
        return int64_t{record.rope_groups} * ((rows + 15) / 16 * 16) * record.group;
    }

    // Tiles 0 to 3: sums. 4, 5: queries and codes, depth `group`. 6, 7: probabilities and values.
    static void begin(const Record& record, const QuantRows& rows, const float* q_pe,
                      uint8_t* scratch) {
        TileConfig config;
        const int m = tile_rows(rows.rows);
        for (int t = 0; t < 4; ++t) config.set(t, m, 64);
        config.set(4, m, record.group);
        config.set(5, record.group / 4, 64);
        config.set(6, m, kPageTokens);
        config.set(7, kPageTokens / 4, 64);
        _tile_loadconfig(&config);

        Buffers b = lay_out(scratch, record, rows.rows);
        const int64_t plane = q_pe_plane(record, rows.rows);
        const int64_t all = (rows.rows + 15) / 16 * 16;
        __builtin_memset(b.q_pe, 0, static_cast<size_t>(kMaxPlanes * plane));
        const float top = rows.planes == 1 ? 127 : 127 * kPlaneStep;
        for (int r = 0; r < rows.rows; ++r)
            for (int g = 0; g < record.rope_groups; ++g) {
                const float* q = q_pe + int64_t{r} * record.rope + g * record.rope_group;
                float largest = 0;
                for (int i = 0; i < record.rope_group; ++i) {
                    const float size = q[i] < 0 ? -q[i] : q[i];
                    if (size > largest) largest = size;
                }
                const float inverse = largest > kTiny ? top / largest : 0;
                int8_t* to =
                    b.q_pe + (g * all + r) * record.group + g * record.rope_group % record.group;
                for (int i = 0; i < record.rope_group; ++i) {
                    const float code = __builtin_rintf(q[i] * inverse);
                    const float high =
                        rows.planes == 1 ? code : __builtin_rintf(code * (1 / kPlaneStep));
                    to[i] = static_cast<int8_t>(high);
                    if (rows.planes == 2)
                        to[plane + i] = static_cast<int8_t>(code - high * kPlaneStep);
                }
                b.pe_scale[r * record.rope_groups + g] = largest / top;
            }
    }

    static void end() { _tile_release(); }

    // ---- scores -----------------------------------------------------------------------------

    // One step of depth: A [rows, group] at a (plane 1: + plane), B [group / 4 lines] at b.
    struct Step {
        const int8_t* a;
        int64_t a_stride, plane;
        const uint8_t* b;
        const float *scale, *zero;          // [16 tokens]; zero may be null
        const float *row_scale, *row_zero;  // of a row, rows apart: row_stride
        int64_t row_stride;
    };

    // Two steps, or one in two planes (high, low), into one half of the tiles.
    template <int Half>
    static void tile_steps(const Step& s, const Step& t, int64_t t_plane, int32_t* c) {
        if constexpr (Half == 0) {
            _tile_zero(0);
            _tile_loadd(4, s.a, s.a_stride);
            _tile_loadd(5, s.b, kLine);
            _tile_dpbssd(0, 4, 5);
            _tile_zero(1);
            _tile_loadd(4, t.a + t_plane, t.a_stride);
            _tile_loadd(5, t.b, kLine);
            _tile_dpbssd(1, 4, 5);
            _tile_stored(0, c, kLine);
            _tile_stored(1, c + 256, kLine);
        } else {
            _tile_zero(2);
            _tile_loadd(4, s.a, s.a_stride);
            _tile_loadd(5, s.b, kLine);
            _tile_dpbssd(2, 4, 5);
            _tile_zero(3);
            _tile_loadd(4, t.a + t_plane, t.a_stride);
            _tile_loadd(5, t.b, kLine);
            _tile_dpbssd(3, 4, 5);
            _tile_stored(2, c + 512, kLine);
            _tile_stored(3, c + 768, kLine);
        }
    }

    // scores [rows, 64] (16 tokens of each row) += the steps whose sums are in c.
    template <int Steps, int Planes, bool Zero>
    static void fold(const Step* s, int rows, const int32_t* c, float* scores) {
        __m512 scale[Steps], zero[Steps];
#pragma GCC unroll 4
        for (int i = 0; i < Steps; ++i) {
            scale[i] = _mm512_loadu_ps(s[i].scale);
            if (Zero) zero[i] = _mm512_loadu_ps(s[i].zero);
        }
        for (int r = 0; r < rows; ++r) {
            __m512 x = _mm512_loadu_ps(scores + r * kPageTokens);
            const int64_t at = r * s[0].row_stride;
#pragma GCC unroll 4
            for (int i = 0; i < Steps; ++i) {
                __m512i sum = _mm512_loadu_si512(c + 256 * Planes * i + 16 * r);
                if constexpr (Planes == 2)
                    sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 7),
                                           _mm512_loadu_si512(c + 512 * i + 256 + 16 * r));
                const __m512 row_scale = _mm512_set1_ps(s[i].row_scale[at]);
                x = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), row_scale), scale[i], x);
                if (Zero) x = _mm512_fmadd_ps(zero[i], _mm512_set1_ps(s[i].row_zero[at]), x);
            }
            _mm512_storeu_ps(scores + r * kPageTokens, x);
        }
    }

    template <int Planes>
    static void fold_any(const Step* s, int steps, int rows, const int32_t* c, float* scores) {
        const bool zero = s[0].zero != nullptr;
        if (Planes == 1 && steps == 2)
            zero ? fold<2, 1, true>(s, rows, c, scores) : fold<2, 1, false>(s, rows, c, scores);
        else
            zero ? fold<1, Planes, true>(s, rows, c, scores)
                 : fold<1, Planes, false>(s, rows, c, scores);
    }

    // The tiles run a batch ahead of the vectors: two of them are written while the vectors read
    // the other two. All four lie in 4 KiB, so that no load takes a store 4 KiB away for its own.
    // Latent and rope steps differ in their strides: no batch mixes them.
    template <int Planes>
    static void run_steps(const Step* steps, int latent, int pe, int rows, int32_t* c,
                          float* scores) {
        int before = 0, before_count = 0, half = 0;
        for (int i = 0; i < latent + pe;) {
            const int left = (i < latent ? latent : latent + pe) - i;
            const int count = Planes == 2 || left == 1 ? 1 : 2;
            // A lone step is computed twice, which is as quick as once.
            const Step &s = steps[i], &t = steps[i + count - 1];
            const int64_t plane = Planes == 2 ? t.plane : 0;
            half ? tile_steps<1>(s, t, plane, c) : tile_steps<0>(s, t, plane, c);
            if (before_count)
                fold_any<Planes>(steps + before, before_count, rows, c + 512 * (1 - half), scores);
            before = i;
            before_count = count;
            i += count;
            half = 1 - half;
        }
        fold_any<Planes>(steps + before, before_count, rows, c + 512 * (1 - half), scores);
    }

    // The block's rope lines in whole steps.
    static const uint8_t* rope_block(const Record& record, const QuantPage& page, int block,
                                     const Buffers& b) {
        const int64_t bytes = int64_t{record.rope} / 4 * kLine;
        const uint8_t* own = reinterpret_cast<const uint8_t*>(page.view.pe_codes) + block * bytes;
        if (record.rope % record.group == 0) return own;
        uint8_t* copy = b.rope + int64_t{block} * rope_lines(record) * kLine;
        __builtin_memcpy(copy, own, static_cast<size_t>(bytes));
        return copy;  // what lies behind meets zeros in A
    }

    static void add_scores(const QuantRows& rows, const QuantPage& page, uint8_t* scratch) {
        const Record& record = *page.record;
        const Buffers b = lay_out(scratch, record, rows.rows);
        const int m = tile_rows(rows.rows), lines = QuantDot<X>::lines_per_group(record);
        const int64_t group_bytes = int64_t{record.group} * kBlockTokens;
        const int64_t all = (rows.rows + 15) / 16 * 16;
        const int64_t q_plane = rows.q[1] - rows.q[0];
        const bool int4 = record.format == CacheFormat::kInt4;
        Step steps[64 + 32];
        for (int block = 0; block < kBlocks; ++block) {
            const int t = block * kBlockTokens;
            const int64_t block_at = int64_t{block} * record.groups * lines * kLine;
            // int8 lines are B as they lie in the cache.
            const uint8_t* codes = page.view.codes + block_at;
            if (int4) {
                for (int g = 0; g < record.groups; ++g) {
                    page.ahead->fetch<X>(lines / 2);
                    QuantDot<X>::unpack_group(record, codes + int64_t{g} * lines * kLine,
                                              b.lines + g * group_bytes);
                }
                codes = b.lines;
            }
            const uint8_t* rope = rope_block(record, page, block, b);
            for (int row = 0; row < rows.rows; row += m) {
                page.ahead->fetch<X>(2 * record.groups);
                Step* step = steps;
                for (int g = 0; g < record.groups; ++g)
                    *step++ = {rows.q[0] + int64_t{row} * record.rank + g * record.group,
                               record.rank,
                               q_plane,
                               codes + g * group_bytes,
                               page.scale + g * kPageTokens + t,
                               int4 ? page.zero + g * kPageTokens + t : nullptr,
                               rows.q_scale + int64_t{row} * record.groups + g,
                               rows.q_sum + int64_t{row} * record.groups + g,
                               record.groups};
                for (int g = 0; g < record.rope_groups; ++g) {
                    const float* scale = b.pe_scale + int64_t{row} * record.rope_groups + g;
                    *step++ = {b.q_pe + (g * all + row) * record.group,
                               record.group,
                               q_pe_plane(record, rows.rows),
                               rope + g * record.rope_group / record.group * group_bytes,
                               page.pe_scale + g * kPageTokens + t,
                               nullptr,
                               scale,
                               scale,
                               record.rope_groups};
                }
                const int count = rows.rows - row < m ? rows.rows - row : m;
                float* scores = rows.scores + int64_t{row} * kPageTokens + t;
                for (int r = 0; r < count; ++r)
                    _mm512_storeu_ps(scores + r * kPageTokens, _mm512_setzero_ps());
                const int latent = record.groups, pe = record.rope_groups;
                if (rows.planes == 1)
                    run_steps<1>(steps, latent, pe, count, b.c, scores);
                else
                    run_steps<2>(steps, latent, pe, count, b.c, scores);
            }
        }
    }

    // ---- values -----------------------------------------------------------------------------

    // c = probabilities [rows, 64 tokens] times two tiles of 16 columns.
    template <int Half>
    static void value_tiles(const uint8_t* p, const uint8_t* values, int stride, int32_t* c) {
        _tile_loadd(6, p, kPageTokens);
        _tile_loadd(7, values, stride);
        if constexpr (Half == 0) {
            _tile_zero(0);
            _tile_dpbusd(0, 6, 7);
            _tile_zero(1);
            _tile_loadd(7, values + kLine, stride);
            _tile_dpbusd(1, 6, 7);
            _tile_stored(0, c, kLine);
            _tile_stored(1, c + 256, kLine);
        } else {
            _tile_zero(2);
            _tile_dpbusd(2, 6, 7);
            _tile_zero(3);
            _tile_loadd(7, values + kLine, stride);
            _tile_dpbusd(3, 6, 7);
            _tile_stored(2, c + 512, kLine);
            _tile_stored(3, c + 768, kLine);
        }
    }

    // 64 numbers 0 to 1 as 15-bit integers: of each 16, the first 8 into the first half, so that
    // packing two halves to bytes gives the tokens in their order.
    static void store_p15(const float* x, float levels, uint8_t* to) {
        for (int i = 0; i < 4; ++i) {
            const __m512 scaled =
                _mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), _mm512_set1_ps(levels));
            const __m256i words = _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(scaled));
            _mm_store_si128(reinterpret_cast<__m128i*>(to + 16 * i), _mm256_castsi256_si128(words));
            _mm_store_si128(reinterpret_cast<__m128i*>(to + 64 + 16 * i),
                            _mm256_extracti128_si256(words, 1));
        }
    }

    static constexpr float kLevels15 = 255 * 128;  // of a probability; a share has 32767

    // round(p * share * 255) of 64 tokens, in 15-bit arithmetic.
    static void multiply_p15(const uint8_t* p, __m512i share_a, __m512i share_b, uint8_t* to) {
        const __m512i shift = _mm512_set1_epi16(1 << 8);  // mulhrs: (x + 64) >> 7
        const __m512i a = _mm512_mulhrs_epi16(_mm512_load_si512(p), share_a);
        const __m512i b = _mm512_mulhrs_epi16(_mm512_load_si512(p + 64), share_b);
        _mm512_store_si512(
            to, _mm512_packus_epi16(_mm512_mulhrs_epi16(a, shift), _mm512_mulhrs_epi16(b, shift)));
    }

    // o [rows, stride] += beta * unit * the sums of 32 columns in c.
    static void fold_values(const float* beta, int rows, float unit, const int32_t* c, float* o,
                            int64_t stride) {
        for (int r = 0; r < rows; ++r, o += stride) {
            const __m512 factor = _mm512_set1_ps(beta[r] * unit);
            const __m512 a = _mm512_cvtepi32_ps(_mm512_loadu_si512(c + 16 * r));
            const __m512 b = _mm512_cvtepi32_ps(_mm512_loadu_si512(c + 256 + 16 * r));
            _mm512_storeu_ps(o, _mm512_fmadd_ps(a, factor, _mm512_loadu_ps(o)));
            _mm512_storeu_ps(o + 16, _mm512_fmadd_ps(b, factor, _mm512_loadu_ps(o + 16)));
        }
    }

    static void add_values(const QuantRows& rows, const QuantPage& page, uint8_t* scratch) {
        const Record& record = *page.record;
        const Buffers b = lay_out(scratch, record, rows.rows);
        const int m = tile_rows(rows.rows), columns = record.group / 16;
        const bool one_plane = rows.planes == 1;
        const float unit = one_plane ? 1 / (255 * (32767 / 32768.0f) * X::kCentreScale)
                                     : QuantDot<X>::value_unit(record, 2);
        const int64_t plane = int64_t{kPageTokens} * ((rows.rows + 15) / 16 * 16);
        if (one_plane) {
            for (int r = 0; r < rows.rows; ++r)
                store_p15(rows.scores + r * kPageTokens, kLevels15, b.p15 + r * 128);
            for (int g = 0; g < record.groups; ++g)
                store_p15(page.share + g * kPageTokens, 32767, b.share15 + g * 128);
        }
        struct {
            const float* beta;
            float* o;
            int count;
            float unit;
        } before = {};
        int half = 0;
        const auto finish = [&] {
            if (before.count)
                fold_values(before.beta, before.count, before.unit, b.c + 512 * (1 - half),
                            before.o, record.group);
        };
        const int lines = QuantDot<X>::lines_per_group(record);
        for (int g = 0; g < record.groups; ++g) {
            page.ahead->fetch<X>(3 * lines);
            QuantDot<X>::transpose_group(record, page.view.codes, g, b.lines);
            if (one_plane) {
                const __m512i share_a = _mm512_load_si512(b.share15 + g * 128);
                const __m512i share_b = _mm512_load_si512(b.share15 + g * 128 + 64);
                for (int r = 0; r < rows.rows; ++r)
                    multiply_p15(b.p15 + r * 128, share_a, share_b, b.p + r * kPageTokens);
            } else {
                for (int r = 0; r < rows.rows; ++r)
                    QuantDot<X>::quantize_probabilities(rows.scores + r * kPageTokens,
                                                        page.share + g * kPageTokens, 2,
                                                        b.p + r * kPageTokens, plane);
            }
            for (int row = 0; row < rows.rows; row += m)
                for (int n = 0; n < rows.planes; ++n)
                    for (int j = 0; j < columns; j += 2) {
                        const uint8_t* p = b.p + n * plane + row * kPageTokens;
                        const uint8_t* values = b.lines + j * kLine;
                        half ? value_tiles<1>(p, values, columns * kLine, b.c)
                             : value_tiles<0>(p, values, columns * kLine, b.c);
                        finish();
                        const float step = !one_plane && n == 0 ? kPlaneStep : 1;
                        before = {rows.beta + row, rows.o_at(row, g, record.group) + 16 * j,
                                  rows.rows - row < m ? rows.rows - row : m,
                                  page.largest[g] * unit * step};
                        half = 1 - half;
                    }
        }
        finish();
    }
};

}  // namespace
}  // namespace mla::cpu
