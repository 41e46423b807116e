// Matrix products: c [rows, columns] = a [rows, depth] b [depth, columns], with sums in fp32.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

namespace mla::cpu {
namespace {

// What one step along the depth multiplies: a row of b, of which kPair lie interleaved, by as many
// elements of a, which all lanes get.
template <class X>
struct Fp32Step {
    using Element = float;
    using Operand = typename X::F;
    static constexpr int kPair = 1;
    static Operand load(const float* p) { return X::load(p); }
    static Operand broadcast(const float* p) { return X::set(*p); }
    static typename X::F add(Operand x, Operand row, typename X::F sum) {
        return X::fma(x, row, sum);
    }
};

template <class X, class Step = Fp32Step<X>>
struct Gemm {
    using F = typename X::F;
    using E = typename Step::Element;
    using Operand = typename Step::Operand;
    static constexpr int kPair = Step::kPair;

    // R rows x C vectors of sums in registers.
    template <int R, int C>
    static void tile(int depth, const E* a, int64_t lda, const E* b, int64_t ldb, float* c,
                     int64_t ldc, bool accumulate) {
        F sums[R][C];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j)
                sums[r][j] = accumulate ? X::load(c + r * ldc + 16 * j) : X::set(0);
        for (int k = 0; k < depth; k += kPair) {
            Operand row[C];
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) row[j] = Step::load(b + k * ldb + 16 * kPair * j);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                const Operand x = Step::broadcast(a + r * lda + k);
#pragma GCC unroll 8
                for (int j = 0; j < C; ++j) sums[r][j] = Step::add(x, row[j], sums[r][j]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int j = 0; j < C; ++j) X::store(c + r * ldc + 16 * j, sums[r][j]);
    }

    // Any number of rows up to R.
    template <int R, int C>
    static void rows_of(int rows, int depth, const E* a, int64_t lda, const E* b, int64_t ldb,
                        float* c, int64_t ldc, bool accumulate) {
        if constexpr (R > 1) {
            if (rows < R) return rows_of<R - 1, C>(rows, depth, a, lda, b, ldb, c, ldc, accumulate);
        }
        tile<R, C>(depth, a, lda, b, ldb, c, ldc, accumulate);
    }

    // A strip of b is used for all rows before the next.
    template <int C>
    static void strip(int rows, int depth, const E* a, int64_t lda, const E* b, int64_t ldb,
                      float* c, int64_t ldc, bool accumulate) {
        constexpr int R = X::kFloatRows;
        for (int r = 0; r < rows; r += R)
            rows_of<R, C>(rows - r < R ? rows - r : R, depth, a + r * lda, lda, b, ldb, c + r * ldc,
                          ldc, accumulate);
    }

    // columns: a multiple of 16; depth of kPair.
    static void run(int rows, int columns, int depth, const E* a, int64_t lda, const E* b,
                    int64_t ldb, float* c, int64_t ldc, bool accumulate) {
        constexpr int C = X::kFloatColumns;
        int j = 0;
        for (; j + 16 * C <= columns; j += 16 * C)
            strip<C>(rows, depth, a, lda, b + kPair * j, ldb, c + j, ldc, accumulate);
        for (; j < columns; j += 16)
            strip<1>(rows, depth, a, lda, b + kPair * j, ldb, c + j, ldc, accumulate);
    }
};

// MatmulTask: a few rows against weights in fp32, bf16 or int8, read once.
template <class X>
struct Matmul {
    using F = typename X::F;

    // Rows of w read side by side. A decode step reads w once, from memory: few long runs at a time
    // come faster than a column of short ones.
    static constexpr int kDepth = 8;

    // Adds rows [begin, end) of w.
    template <int R, int C, WeightLayout L>
    static void tile(const MatmulTask& task, int column, int begin, int end) {
        F sums[R][C];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j)
                sums[r][j] = begin ? X::load(task.out[r] + column + 16 * j) : X::set(0);
        constexpr int step = L == WeightLayout::kPairsBf16 ? 2 : 1;
        for (int k = begin; k < end; k += step) {
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                const int64_t at = k * task.stride + (column + 16 * j) * step;
                if constexpr (L == WeightLayout::kPairsBf16) {
                    const typename X::I both = X::load(
                        static_cast<const void*>(static_cast<const uint16_t*>(task.w) + at));
                    const F even = X::bf16_low(both), odd = X::bf16_high(both);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r) {
                        sums[r][j] = X::fma(X::set(task.x[r][k]), even, sums[r][j]);
                        sums[r][j] = X::fma(X::set(task.x[r][k + 1]), odd, sums[r][j]);
                    }
                } else {
                    F w;
                    if constexpr (L == WeightLayout::kRowsFp32)
                        w = X::load(static_cast<const float*>(task.w) + at);
                    else if constexpr (L == WeightLayout::kRowsBf16)
                        w = X::load_bf16(static_cast<const uint16_t*>(task.w) + at);
                    else
                        w = X::load_int8(static_cast<const int8_t*>(task.w) + at);
#pragma GCC unroll 4
                    for (int r = 0; r < R; ++r)
                        sums[r][j] = X::fma(X::set(task.x[r][k]), w, sums[r][j]);
                }
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
            for (int j = 0; j < C; ++j) {
                F sum = sums[r][j];
                if (L == WeightLayout::kRowsInt8 && end == task.k)
                    sum = X::mul(sum, X::load(task.scale + column + 16 * j));
                X::store(task.out[r] + column + 16 * j, sum);
            }
    }

    template <int R, WeightLayout L>
    static void rows(const MatmulTask& task) {
        if constexpr (R > 1) {
            if (task.rows < R) return rows<R - 1, L>(task);
        }
        constexpr int C = X::kFloatColumns;
        for (int k = 0; k < task.k; k += kDepth) {
            const int end = k + kDepth < task.k ? k + kDepth : task.k;
            int column = 0;
            for (; column + 16 * C <= task.n; column += 16 * C) tile<R, C, L>(task, column, k, end);
            for (; column < task.n; column += 16) tile<R, 1, L>(task, column, k, end);
        }
    }

    static void run(const MatmulTask& task) {
        switch (task.layout) {
            case WeightLayout::kRowsFp32:
                return rows<kMatmulRows, WeightLayout::kRowsFp32>(task);
            case WeightLayout::kRowsBf16:
                return rows<kMatmulRows, WeightLayout::kRowsBf16>(task);
            case WeightLayout::kPairsBf16:
                return rows<kMatmulRows, WeightLayout::kPairsBf16>(task);
            case WeightLayout::kRowsInt8:
                return rows<kMatmulRows, WeightLayout::kRowsInt8>(task);
        }
    }
};

}  // namespace
}  // namespace mla::cpu
