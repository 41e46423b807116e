// The bf16 matrix product of the expanded mode on vectors.
#pragma once

#include "cpu/simd/gemm.h"
#include "cpu/simd/vector_avx512.h"

namespace mla::cpu {
namespace {

// vdpbf16ps: the products of two neighbouring rows of b at once.
struct Bf16Step {
    using Element = uint16_t;
    using Operand = __m512bh;
    static constexpr int kPair = 2;
    static Operand load(const uint16_t* p) {
        return (__m512bh)Avx512::load(static_cast<const void*>(p));
    }
    static Operand broadcast(const uint16_t* p) { return (__m512bh)Avx512::broadcast_dword(p); }
    static __m512 add(Operand x, Operand row, __m512 sum) { return _mm512_dpbf16_ps(sum, x, row); }
};

struct MatBf16 {
    using Element = uint16_t;
    static constexpr int kPair = Bf16Step::kPair;
    static void begin() {}
    static void end() {}
    static void run(int rows, int columns, int depth, const uint16_t* a, int64_t lda,
                    const uint16_t* b, int64_t ldb, float* c, int64_t ldc) {
        Gemm<Avx512, Bf16Step>::run(rows, columns, depth, a, lda, b, ldb, c, ldc, false);
    }
    static void store(uint16_t* p, __m512 x) { Avx512::store_bf16(p, x); }
};

}  // namespace
}  // namespace mla::cpu
