// Sixteen lanes on AVX2: two registers. The contract is vector_avx512.h's; with __AVXVNNI__ the
// byte dots are vpdpbusd.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mla::cpu {
namespace {

struct Avx2 {
    struct F {
        __m256 a, b;
    };
    struct I {
        __m256i a, b;
    };

#if defined(__AVXVNNI__)
    static constexpr bool kUnsignedCodes = true;
    static constexpr int kPairSteps = 0;
#else
    // vpmaddubsw adds two products in 16 bit: signed codes keep int8's from saturating.
    static constexpr bool kUnsignedCodes = false;
    // Eight such pairs of an int4 code fit 16 bit: 8 * 2 * 15 * 127 and 8 * 2 * 8 * 255 < 2^15.
    static constexpr int kPairSteps = 8;
#endif
    static constexpr int kMaxProbability = 255;
    static constexpr int kCentreScale = 1;
    static constexpr int kScoreRows = 4;
    static constexpr int kScoreBlocks = 1;
    static constexpr int kValueRows = 2;
    static constexpr int kValueColumns = 2;
    static constexpr int kFloatRows = 3;
    static constexpr int kFloatColumns = 2;

    static F both(__m256 x) { return {x, x}; }
    static I both(__m256i x) { return {x, x}; }

    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F x) {
        _mm256_storeu_ps(p, x.a);
        _mm256_storeu_ps(p + 8, x.b);
    }
    static F set(float x) { return both(_mm256_set1_ps(x)); }
    static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static F fma(F x, F y, F z) {
        return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
    }
    static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static F abs(F x) {
        const __m256 sign = _mm256_set1_ps(-0.0f);
        return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
    }
    static F round(F x) {
        constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        return {_mm256_round_ps(x.a, kMode), _mm256_round_ps(x.b, kMode)};
    }
    static F select_greater(F x, F y, F then, F otherwise) {
        return {_mm256_blendv_ps(otherwise.a, then.a, _mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ)),
                _mm256_blendv_ps(otherwise.b, then.b, _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ))};
    }
    static F first_lanes(int count, F x, F y) {
        const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        const __m256i a = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes);
        const __m256i b = _mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lanes);
        return {_mm256_blendv_ps(y.a, x.a, _mm256_castsi256_ps(a)),
                _mm256_blendv_ps(y.b, x.b, _mm256_castsi256_ps(b))};
    }
    static float sum(F x) {  // by halves: 8, 4, 2, 1
        const __m256 a = _mm256_add_ps(x.a, x.b);
        const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
        return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
    }
    static float highest(F x) {
        const __m256 a = _mm256_max_ps(x.a, x.b);
        const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
        return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
    }
    static __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static F load_half(const uint16_t* p) {
        return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 8))};
    }
    static void store_half(uint16_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.a, 0));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.b, 0));
    }
    static F load_bf16(const uint16_t* p) {
        const auto widen = [](__m128i x) {
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
        };
        return {widen(load16(p)), widen(load16(p + 8))};
    }
    static F load_int8(const int8_t* p) {
        const __m128i x = load16(p);
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(x)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(x, 8)))};
    }
    static F bf16_low(I x) {
        return {_mm256_castsi256_ps(_mm256_slli_epi32(x.a, 16)),
                _mm256_castsi256_ps(_mm256_slli_epi32(x.b, 16))};
    }
    static F bf16_high(I x) {
        const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000));
        return {_mm256_castsi256_ps(_mm256_and_si256(x.a, mask)),
                _mm256_castsi256_ps(_mm256_and_si256(x.b, mask))};
    }
    static __m256 exp2_half(__m256 x) {
        x = _mm256_max_ps(x, _mm256_set1_ps(-126));
        const __m256 whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 part = _mm256_sub_ps(x, whole);
        __m256 y = _mm256_set1_ps(0.0013333558f);
        y = _mm256_fmadd_ps(y, part, _mm256_set1_ps(0.0096181291f));
        y = _mm256_fmadd_ps(y, part, _mm256_set1_ps(0.0555041087f));
        y = _mm256_fmadd_ps(y, part, _mm256_set1_ps(0.2402265070f));
        y = _mm256_fmadd_ps(y, part, _mm256_set1_ps(0.6931471806f));
        y = _mm256_fmadd_ps(y, part, _mm256_set1_ps(1.0f));
        const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
        y = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
        return _mm256_and_ps(y, _mm256_cmp_ps(x, _mm256_set1_ps(-100), _CMP_GT_OQ));
    }
    static F exp2(F x) { return {exp2_half(x.a), exp2_half(x.b)}; }
    static F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }

    static I load(const void* p) {
        const __m256i* at = static_cast<const __m256i*>(p);
        return {_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
    }
    static void store(void* p, I x) {
        __m256i* at = static_cast<__m256i*>(p);
        _mm256_storeu_si256(at, x.a);
        _mm256_storeu_si256(at + 1, x.b);
    }
    static I set_byte(int x) { return both(_mm256_set1_epi8(static_cast<char>(x))); }
    static I zero() { return both(_mm256_setzero_si256()); }
    static I xor_(I x, I y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
    static I and_(I x, I y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
    static I add_dwords(I x, I y) {
        return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
    }
    template <int N>
    static I shift_left_dwords(I x) {
        return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
    }
    static I broadcast_dword(const void* p) {
        int32_t x;
        __builtin_memcpy(&x, p, 4);
        return both(_mm256_set1_epi32(x));
    }
    static I low_nibbles(I x) { return and_(x, set_byte(15)); }
    static I high_nibbles(I x) {
        return and_({_mm256_srli_epi16(x.a, 4), _mm256_srli_epi16(x.b, 4)}, set_byte(15));
    }
    static I centred(I codes) {
        const __m256i eight = _mm256_set1_epi8(8);
        return {_mm256_sub_epi8(codes.a, eight), _mm256_sub_epi8(codes.b, eight)};
    }
    static I centred_low(I x) { return centred(low_nibbles(x)); }
    static I centred_high(I x) { return centred(high_nibbles(x)); }

    // sums + four products of unsigned and signed bytes a lane; without VNNI two of the products
    // must fit 16 bit together.
    static __m256i dot(__m256i sums, __m256i u, __m256i s) {
#if defined(__AVXVNNI__)
        return _mm256_dpbusd_avx_epi32(sums, u, s);
#else
        const __m256i pairs = _mm256_maddubs_epi16(u, s);
        __asm__("vpaddd %1, %0, %0"  // see add_words()
                : "+x"(sums)
                : "x"(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
        return sums;
#endif
    }
    // Left to itself, GCC computes all products of a step before the first sum, and spills the
    // sums.
    static void add_words(__m256i& sum, __m256i x) {
        __asm__("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x));
    }
    // Pairs of products in 16 bit, where one of the two is an int4 code.
    static I dot_pairs(I pairs, I u, I s) {
        add_words(pairs.a, _mm256_maddubs_epi16(u.a, s.a));
        add_words(pairs.b, _mm256_maddubs_epi16(u.b, s.b));
        return pairs;
    }
    static I add_pairs(I sums, I pairs) {
        const __m256i ones = _mm256_set1_epi16(1);
        return add_dwords(sums,
                          {_mm256_madd_epi16(pairs.a, ones), _mm256_madd_epi16(pairs.b, ones)});
    }
    static I dot_int4(I sums, I codes, I query) {
        return {dot(sums.a, codes.a, query.a), dot(sums.b, codes.b, query.b)};
    }
    static I dot_int8(I sums, I codes, I query) {
#if defined(__AVXVNNI__)
        return dot_int4(sums, codes, query);
#else
        const auto signed_dot = [](__m256i sum, __m256i c, __m256i q) {
            return dot(sum, _mm256_abs_epi8(c), _mm256_sign_epi8(q, c));
        };
        return {signed_dot(sums.a, codes.a, query.a), signed_dot(sums.b, codes.b, query.b)};
#endif
    }
    static I dot_values(I sums, I probabilities, I codes) {
        return dot_int4(sums, probabilities, codes);
    }
    static __m128i to_words(__m256 x) {
        const __m256i dwords = _mm256_cvtps_epi32(x);
        return _mm_packs_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
    }
    static void store_bytes(uint8_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm_packus_epi16(to_words(x.a), to_words(x.b)));
    }
    static void store_signed_bytes(int8_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm_packs_epi16(to_words(x.a), to_words(x.b)));
    }
    static void transpose_quads(I (&x)[4]) {
        const __m256i bytes = _mm256_broadcastsi128_si256(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        for (I& line : x)
            line = {_mm256_shuffle_epi8(line.a, bytes), _mm256_shuffle_epi8(line.b, bytes)};
        const auto low = [](__m256i a, __m256i b) { return _mm256_permute2x128_si256(a, b, 0x20); };
        const auto high = [](__m256i a, __m256i b) {
            return _mm256_permute2x128_si256(a, b, 0x31);
        };
        const I q0 = {low(x[0].a, x[1].a), low(x[2].a, x[3].a)};
        const I q1 = {high(x[0].a, x[1].a), high(x[2].a, x[3].a)};
        const I q2 = {low(x[0].b, x[1].b), low(x[2].b, x[3].b)};
        const I q3 = {high(x[0].b, x[1].b), high(x[2].b, x[3].b)};
        x[0] = q0;
        x[1] = q1;
        x[2] = q2;
        x[3] = q3;
    }
    template <int J>
    static F signed_byte(I x) {
        const auto field = [](__m256i y) {
            return _mm256_srai_epi32(_mm256_slli_epi32(y, 24 - 8 * J), 24);
        };
        return to_float({field(x.a), field(x.b)});
    }
    template <int Shift, int Mask>
    static F field(I x) {
        const __m256i mask = _mm256_set1_epi32(Mask);
        return to_float({_mm256_and_si256(_mm256_srli_epi32(x.a, Shift), mask),
                         _mm256_and_si256(_mm256_srli_epi32(x.b, Shift), mask)});
    }
    static void transpose8(__m256 (&x)[8]) {
        __m256 t[8];
        for (int i = 0; i < 8; i += 2) {
            t[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
            t[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
        }
        __m256 u[8];
        for (int i = 0; i < 8; i += 4) {
            u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
            u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
            u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
            u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
        }
        for (int i = 0; i < 4; ++i) {
            x[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
            x[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
        }
    }
    static void transpose(F (&x)[16]) {
        __m256 quarter[2][2][8];  // [row half][column half]
        for (int i = 0; i < 16; ++i) {
            quarter[i / 8][0][i % 8] = x[i].a;
            quarter[i / 8][1][i % 8] = x[i].b;
        }
        for (auto& half : quarter)
            for (auto& block : half) transpose8(block);
        for (int i = 0; i < 16; ++i) x[i] = {quarter[0][i / 8][i % 8], quarter[1][i / 8][i % 8]};
    }
    // See vector_avx512.h.
    class FlushDenormals {
      public:
        FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
        ~FlushDenormals() { _mm_setcsr(saved_); }

      private:
        unsigned saved_;
    };
    static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
};

}  // namespace
}  // namespace mla::cpu
