// The bf16 matrix product of the expanded mode on tiles.
#pragma once

#include "cpu/simd/tile_config.h"
#include "cpu/simd/vector_avx512.h"

namespace mla::cpu {
namespace {

// Blocks of 2 x 2 tiles.
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
