// The bf16 matrix product of the expanded mode on vectors: vdpbf16ps adds products of two
// neighbouring rows of b at once.
#pragma once

#include "cpu/simd/vector_avx512.h"

namespace mla::cpu {
namespace {

struct MatBf16 {
    using Element = uint16_t;
    static constexpr int kPair = 2;
    static constexpr int kRows = Avx512::kFloatRows, kColumns = Avx512::kFloatColumns;
    static void store(uint16_t* p, __m512 x) { Avx512::store_bf16(p, x); }
    static void begin() {}
    static void end() {}

    // R rows x C vectors of sums in registers.
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
            for (int j = 0; j < C; ++j)
                row[j] = (__m512bh)Avx512::load(static_cast<const void*>(b + k * ldb + 32 * j));
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
            for (int j = 0; j < C; ++j) Avx512::store(c + r * ldc + 16 * j, sums[r][j]);
    }

    // Any number of rows up to R.
    template <int R, int C>
    static void rows_of(int rows, int depth, const uint16_t* a, int64_t lda, const uint16_t* b,
                        int64_t ldb, float* c, int64_t ldc) {
        if constexpr (R > 1) {
            if (rows < R) return rows_of<R - 1, C>(rows, depth, a, lda, b, ldb, c, ldc);
        }
        tile<R, C>(depth, a, lda, b, ldb, c, ldc);
    }

    // A strip of b is used for all rows before the next.
    template <int C>
    static void strip(int rows, int depth, const uint16_t* a, int64_t lda, const uint16_t* b,
                      int64_t ldb, float* c, int64_t ldc) {
        for (int r = 0; r < rows; r += kRows)
            rows_of<kRows, C>(rows - r < kRows ? rows - r : kRows, depth, a + r * lda, lda, b, ldb,
                              c + r * ldc, ldc);
    }

    // columns: a multiple of 16; depth of 2.
    static void run(int rows, int columns, int depth, const uint16_t* a, int64_t lda,
                    const uint16_t* b, int64_t ldb, float* c, int64_t ldc) {
        int j = 0;
        for (; j + 16 * kColumns <= columns; j += 16 * kColumns)
            strip<kColumns>(rows, depth, a, lda, b + 2 * j, ldb, c + j, ldc);
        for (; j < columns; j += 16) strip<1>(rows, depth, a, lda, b + 2 * j, ldb, c + j, ldc);
    }
};

}  // namespace
}  // namespace mla::cpu
