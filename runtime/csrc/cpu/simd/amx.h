// Tiles: 16 rows of queries or probabilities (A) by 16 tokens or channels (B) at a time.
//
// A TDP takes as many cycles as A has rows, so rows are spread evenly over the tiles they need. The
// cache's blocked lines are rows of B as they are: a group of 64 channels is one step of depth 64.
// The intrinsics want literal tile numbers, hence the repetition.
#pragma once

#include <immintrin.h>

#include "cpu/simd/quant_page.h"
#include "cpu/simd/vector_avx512.h"

namespace mla::cpu {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t columns_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int row_count, int bytes) {
        rows[tile] = static_cast<uint8_t>(row_count);
        columns_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

// Scores and values of int4 and int8 pages, the rope part included.
struct AmxDot {
    using X = Avx512;
    static constexpr bool kScoresRope = true;
    static constexpr int kTileBytes = 1024;

    struct Buffers {
        uint8_t* lines;    // a block's groups in the dot's codes, or a group's transposed values
        uint8_t* rope;     // [4][rope lines padded] when the page's own cannot be read in whole steps
        int32_t* c;        // 4 tiles
        uint8_t* p;        // [planes][rows][64]
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
        b.q_pe = reinterpret_cast<int8_t*>(
            take(kMaxPlanes * record.rope_groups * all * record.group));
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
                int8_t* to = b.q_pe + (g * all + r) * record.group +
                             g * record.rope_group % record.group;
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

    static constexpr int kMaxSteps = 64 + 32;

    template <bool Signed>
    static void four_steps(const Step* s, int32_t* c) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        _tile_loadd(4, s[0].a, s[0].a_stride);
        _tile_loadd(5, s[0].b, kLine);
        if (Signed) _tile_dpbssd(0, 4, 5); else _tile_dpbsud(0, 4, 5);
        _tile_loadd(4, s[1].a, s[1].a_stride);
        _tile_loadd(5, s[1].b, kLine);
        if (Signed) _tile_dpbssd(1, 4, 5); else _tile_dpbsud(1, 4, 5);
        _tile_loadd(4, s[2].a, s[2].a_stride);
        _tile_loadd(5, s[2].b, kLine);
        if (Signed) _tile_dpbssd(2, 4, 5); else _tile_dpbsud(2, 4, 5);
        _tile_loadd(4, s[3].a, s[3].a_stride);
        _tile_loadd(5, s[3].b, kLine);
        if (Signed) _tile_dpbssd(3, 4, 5); else _tile_dpbsud(3, 4, 5);
        _tile_stored(0, c, kLine);
        _tile_stored(1, c + 256, kLine);
        _tile_stored(2, c + 512, kLine);
        _tile_stored(3, c + 768, kLine);
    }

    template <bool Signed>
    static void one_step(const Step& s, bool two_planes, int32_t* c) {
        _tile_loadd(5, s.b, kLine);
        _tile_loadd(4, s.a, s.a_stride);
        _tile_zero(0);
        if (Signed) _tile_dpbssd(0, 4, 5); else _tile_dpbsud(0, 4, 5);
        _tile_stored(0, c, kLine);
        if (!two_planes) return;
        _tile_loadd(4, s.a + s.plane, s.a_stride);
        _tile_zero(1);
        if (Signed) _tile_dpbssd(1, 4, 5); else _tile_dpbsud(1, 4, 5);
        _tile_stored(1, c + 256, kLine);
    }

    // scores [rows, 64] (16 tokens of each row) += N steps whose sums are in c.
    template <int N>
    static void fold(const Step* s, int rows, const int32_t* c, float* scores) {
        __m512 scale[N], zero[N];
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) {
            scale[i] = _mm512_loadu_ps(s[i].scale);
            zero[i] = s[i].zero ? _mm512_loadu_ps(s[i].zero) : _mm512_setzero_ps();
        }
        for (int r = 0; r < rows; ++r) {
            __m512 x = _mm512_loadu_ps(scores + r * kPageTokens);
#pragma GCC unroll 4
            for (int i = 0; i < N; ++i) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(c + 256 * i + 16 * r));
                const int64_t at = r * s[i].row_stride;
                const __m512 scaled = _mm512_mul_ps(sum, _mm512_set1_ps(s[i].row_scale[at]));
                x = _mm512_fmadd_ps(scaled, scale[i], x);
                x = _mm512_fmadd_ps(zero[i], _mm512_set1_ps(s[i].row_zero[at]), x);
            }
            _mm512_storeu_ps(scores + r * kPageTokens, x);
        }
    }

    static void fold_planes(const Step& s, int rows, const int32_t* c, float* scores) {
        const __m512 scale = _mm512_loadu_ps(s.scale);
        const __m512 zero = s.zero ? _mm512_loadu_ps(s.zero) : _mm512_setzero_ps();
        for (int r = 0; r < rows; ++r) {
            const __m512i high = _mm512_slli_epi32(_mm512_loadu_si512(c + 16 * r), 7);
            const __m512i both = _mm512_add_epi32(high, _mm512_loadu_si512(c + 256 + 16 * r));
            const int64_t at = r * s.row_stride;
            const __m512 scaled =
                _mm512_mul_ps(_mm512_cvtepi32_ps(both), _mm512_set1_ps(s.row_scale[at]));
            __m512 x = _mm512_loadu_ps(scores + r * kPageTokens);
            x = _mm512_fmadd_ps(scaled, scale, x);
            x = _mm512_fmadd_ps(zero, _mm512_set1_ps(s.row_zero[at]), x);
            _mm512_storeu_ps(scores + r * kPageTokens, x);
        }
    }

    template <bool Signed>
    static void run_steps(const Step* steps, int count, bool two_planes, int rows, int32_t* c,
                          float* scores) {
        int i = 0;
        if (!two_planes)
            for (; i + 4 <= count; i += 4) {
                four_steps<Signed>(steps + i, c);
                fold<4>(steps + i, rows, c, scores);
            }
        for (; i < count; ++i) {
            one_step<Signed>(steps[i], two_planes, c);
            if (two_planes)
                fold_planes(steps[i], rows, c, scores);
            else
                fold<1>(steps + i, rows, c, scores);
        }
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
        const bool two = rows.planes == 2;
        Step steps[64], rope_steps[32];
        for (int block = 0; block < kBlocks; ++block) {
            const int t = block * kBlockTokens;
            int64_t at = int64_t{block} * record.groups * lines * kLine;
            for (int g = 0; g < record.groups; ++g, at += int64_t{lines} * kLine) {
                for (int k = 0; k < lines; ++k) X::prefetch(page.next_codes + at + k * kLine);
                QuantDot<X>::unpack_group(record, page.view.codes + at, b.lines + g * group_bytes);
            }
            const uint8_t* rope = rope_block(record, page, block, b);
            for (int row = 0; row < rows.rows; row += m) {
                for (int g = 0; g < record.groups; ++g)
                    steps[g] = {rows.q[0] + int64_t{row} * record.rank + g * record.group,
                                record.rank,
                                two ? q_plane : 0,
                                b.lines + g * group_bytes,
                                page.scale + g * kPageTokens + t,
                                page.zero + g * kPageTokens + t,
                                rows.q_scale + int64_t{row} * record.groups + g,
                                rows.q_sum + int64_t{row} * record.groups + g,
                                record.groups};
                for (int g = 0; g < record.rope_groups; ++g) {
                    const float* scale = b.pe_scale + int64_t{row} * record.rope_groups + g;
                    rope_steps[g] = {b.q_pe + (g * all + row) * record.group,
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
                run_steps<true>(rope_steps, record.rope_groups, two, count, b.c, scores);
                run_steps<false>(steps, record.groups, two, count, b.c, scores);
            }
        }
    }

    // ---- values -----------------------------------------------------------------------------

    // c = probabilities [rows, 64 tokens] times four (two) tiles of 16 columns.
    static void value_tiles(const uint8_t* p, const uint8_t* values, int columns, int32_t* c) {
        const int stride = columns * kLine;
        _tile_loadd(6, p, kPageTokens);
        _tile_zero(0);
        _tile_loadd(7, values, stride);
        _tile_dpbusd(0, 6, 7);
        _tile_zero(1);
        _tile_loadd(7, values + kLine, stride);
        _tile_dpbusd(1, 6, 7);
        if (columns == 4) {
            _tile_zero(2);
            _tile_loadd(7, values + 2 * kLine, stride);
            _tile_dpbusd(2, 6, 7);
            _tile_zero(3);
            _tile_loadd(7, values + 3 * kLine, stride);
            _tile_dpbusd(3, 6, 7);
        }
        _tile_stored(0, c, kLine);
        _tile_stored(1, c + 256, kLine);
        if (columns == 4) {
            _tile_stored(2, c + 512, kLine);
            _tile_stored(3, c + 768, kLine);
        }
    }

    static void add_values(const QuantRows& rows, const QuantPage& page, uint8_t* scratch) {
        const Record& record = *page.record;
        const Buffers b = lay_out(scratch, record, rows.rows);
        const int m = tile_rows(rows.rows), columns = record.group / 16;
        const float unit = QuantDot<X>::value_unit(record, rows.planes);
        const int64_t plane = int64_t{kPageTokens} * ((rows.rows + 15) / 16 * 16);
        for (int g = 0; g < record.groups; ++g) {
            QuantDot<X>::transpose_group(record, page.view.codes, g, b.lines);
            for (int r = 0; r < rows.rows; ++r)
                QuantDot<X>::quantize_probabilities(rows.scores + r * kPageTokens,
                                                    page.share + g * kPageTokens, rows.planes,
                                                    b.p + r * kPageTokens, plane);
            const float group_unit = page.largest[g] * unit;
            for (int row = 0; row < rows.rows; row += m) {
                const int count = rows.rows - row < m ? rows.rows - row : m;
                for (int n = 0; n < rows.planes; ++n) {
                    value_tiles(b.p + n * plane + row * kPageTokens, b.lines, columns, b.c);
                    const float step = rows.planes == 2 && n == 0 ? kPlaneStep : 1;
                    for (int r = 0; r < count; ++r) {
                        const __m512 factor =
                            _mm512_set1_ps(rows.beta[row + r] * group_unit * step);
                        float* o = rows.o + int64_t{row + r} * record.rank + g * record.group;
                        for (int j = 0; j < columns; ++j) {
                            const __m512i sum = _mm512_loadu_si512(b.c + 256 * j + 16 * r);
                            _mm512_storeu_ps(o + 16 * j,
                                             _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor,
                                                             _mm512_loadu_ps(o + 16 * j)));
                        }
                    }
                }
            }
        }
    }
};

// The bf16 product of the expanded mode: blocks of 2 x 2 tiles.
struct MatAmx {
    using Element = uint16_t;
    static constexpr int kPair = 2;
    static void store(uint16_t* p, __m512 x) { Avx512::store_bf16(p, x); }

    static void begin() {
        TileConfig config;
        for (int t = 0; t < 8; ++t) config.set(t, 16, 64);
        _tile_loadconfig(&config);
    }
    static void end() { _tile_release(); }

    static void block_2x2(int depth, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb,
                          float* c, int64_t ldc) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int k = 0; k < depth; k += 32) {
            _tile_loadd(4, a + k, 2 * lda);
            _tile_loadd(6, b + k * ldb, 4 * ldb);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(7, b + k * ldb + 32, 4 * ldb);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a + 16 * lda + k, 2 * lda);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, c, 4 * ldc);
        _tile_stored(1, c + 16, 4 * ldc);
        _tile_stored(2, c + 16 * ldc, 4 * ldc);
        _tile_stored(3, c + 16 * ldc + 16, 4 * ldc);
    }

    static void block_1x1(int depth, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb,
                          float* c, int64_t ldc) {
        _tile_zero(0);
        for (int k = 0; k < depth; k += 32) {
            _tile_loadd(4, a + k, 2 * lda);
            _tile_loadd(6, b + k * ldb, 4 * ldb);
            _tile_dpbf16ps(0, 4, 6);
        }
        _tile_stored(0, c, 4 * ldc);
    }

    // rows, columns: multiples of 16; depth of 32.
    static void run(int rows, int columns, int depth, const uint16_t* a, int64_t lda,
                    const uint16_t* b, int64_t ldb, float* c, int64_t ldc) {
        int j = 0;
        for (; j + 32 <= columns; j += 32) {
            int r = 0;
            for (; r + 32 <= rows; r += 32)
                block_2x2(depth, a + r * lda, lda, b + 2 * j, ldb, c + r * ldc + j, ldc);
            for (; r < rows; r += 16)
                for (int i = j; i < j + 32; i += 16)
                    block_1x1(depth, a + r * lda, lda, b + 2 * i, ldb, c + r * ldc + i, ldc);
        }
        for (; j < columns; j += 16)
            for (int r = 0; r < rows; r += 16)
                block_1x1(depth, a + r * lda, lda, b + 2 * j, ldb, c + r * ldc + j, ldc);
    }
};

}  // namespace
}  // namespace mla::cpu
