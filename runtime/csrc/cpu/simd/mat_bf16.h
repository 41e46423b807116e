// The bf16 product of the expanded mode on AVX-512 BF16: vdpbf16ps, two channels a lane.
#pragma once

#include "cpu/simd/vector_avx512.h"

namespace mla::cpu {
namespace {

struct MatBf16 {
    using Element = uint16_t;
    static constexpr int kPair = 2;
    static void begin() {}
    static void end() {}
    static void store(uint16_t* p, __m512 x) { Avx512::store_bf16(p, x); }

    template <int R, int C>
    static void tile(int depth, const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb,
                     float* c, int64_t ldc) {
        __m512 sums[R][C];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) sums[r][j] = _mm512_setzero_ps();
        for (int k = 0; k < depth; k += 2) {
            __m512bh row[C];
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) row[j] = (__m512bh)_mm512_loadu_si512(b + k * ldb + 32 * j);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const __m512bh x = (__m512bh)Avx512::broadcast_dword(a + r * lda + k);
#pragma GCC unroll 8
                for (int j = 0; j < C; ++j) sums[r][j] = _mm512_dpbf16_ps(sums[r][j], x, row[j]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) _mm512_storeu_ps(c + r * ldc + 16 * j, sums[r][j]);
    }

    // rows: a multiple of 4; columns of 16.
    static void run(int rows, int columns, int depth, const uint16_t* a, int64_t lda,
                    const uint16_t* b, int64_t ldb, float* c, int64_t ldc) {
        for (int r = 0; r < rows; r += 4) {
            int j = 0;
            for (; j + 64 <= columns; j += 64)
                tile<4, 4>(depth, a + r * lda, lda, b + 2 * j, ldb, c + r * ldc + j, ldc);
            for (; j < columns; j += 16)
                tile<4, 1>(depth, a + r * lda, lda, b + 2 * j, ldb, c + r * ldc + j, ldc);
        }
    }
};

}  // namespace
}  // namespace mla::cpu
