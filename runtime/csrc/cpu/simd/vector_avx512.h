// Sixteen lanes on AVX-512 VNNI: one register. docs/kernels.md gives the contract
// that vector_avx512.h, vector_avx2.h and vector_neon.h share.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mla::cpu {
namespace {

struct Avx512 {
    using F = __m512;   // 16 floats
    using I = __m512i;  // 16 dwords or 64 bytes

    static constexpr bool kUnsignedCodes = true;  // vpdpbusd: unsigned codes, signed queries
    // Products that are added in pairs of 16 bit before they go to 32; 0: they go at once.
    static constexpr int kPairSteps = 0;
    static constexpr int kMaxProbability = 255;  // unsigned probabilities, signed codes
    static constexpr int kCentreScale = 16;      // centred codes stay in the high nibble
    static constexpr int kScoreRows = 8;
    static constexpr int kScoreBlocks = 2;
    static constexpr int kValueRows = 4;  // 4 rows x 4 columns of sums
    static constexpr int kValueColumns = 4;
    static constexpr int kFloatRows = 6;  // 6 rows x 4 columns
    static constexpr int kFloatColumns = 4;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F set(float x) { return _mm512_set1_ps(x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F abs(F a) { return _mm512_abs_ps(a); }
    static F round(F a) {
        return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    // a > b ? x : y
    static F select_greater(F a, F b, F x, F y) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), y, x);
    }
    // Lanes below `count` of x, then y.
    static F first_lanes(int count, F x, F y) {
        return _mm512_mask_blend_ps(static_cast<__mmask16>((1u << count) - 1u), y, x);
    }
    static float sum(F x) {  // by halves: 8, 4, 2, 1
        const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
        const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
        return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
    }
    static float highest(F x) { return _mm512_reduce_max_ps(x); }
    static F load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static void store_half(uint16_t* p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                            _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static F load_bf16(const uint16_t* p) {
        const I wide =
            _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static F load_int8(const int8_t* p) {
        return _mm512_cvtepi32_ps(
            _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    // 2^x; 0 below -100.
    static F exp2(F x) {
        const F whole = round(x);
        const F part = sub(x, whole);
        F y = set(0.0013333558f);
        y = fma(y, part, set(0.0096181291f));
        y = fma(y, part, set(0.0555041087f));
        y = fma(y, part, set(0.2402265070f));
        y = fma(y, part, set(0.6931471806f));
        y = fma(y, part, set(1.0f));
        return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, set(-100), _CMP_GT_OQ), y, whole);
    }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }

    static I load(const void* p) { return _mm512_loadu_si512(p); }
    static void store(void* p, I x) { _mm512_storeu_si512(p, x); }
    // The two bf16 of each dword as floats.
    static F bf16_low(I x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
    static F bf16_high(I x) {
        return _mm512_castsi512_ps(
            _mm512_and_si512(x, set_dword(static_cast<int32_t>(0xffff0000))));
    }
#if defined(__AVX512BF16__)
    static I bf16_bits(F x) {  // in the low half of each dword
        return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x));
    }
#else
    static I bf16_bits(F x) {
        const I bits = _mm512_castps_si512(x);
        const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), set_dword(1));
        const I up = _mm512_add_epi32(odd, set_dword(0x7fff));
        return _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    }
#endif
    static void store_bf16(uint16_t* p, F x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(bf16_bits(x)));
    }
    // 16 pairs (low, high).
    static void store_bf16_pairs(uint16_t* p, F low, F high) {
        store(static_cast<void*>(p),
              _mm512_or_si512(bf16_bits(low), _mm512_slli_epi32(bf16_bits(high), 16)));
    }
    static I set_dword(int32_t x) { return _mm512_set1_epi32(x); }
    static I set_byte(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
    static I zero() { return _mm512_setzero_si512(); }
    static I xor_(I a, I b) { return _mm512_xor_si512(a, b); }
    static I add_dwords(I a, I b) { return _mm512_add_epi32(a, b); }
    template <int N>
    static I shift_left_dwords(I a) {
        return _mm512_slli_epi32(a, N);
    }
    static I broadcast_dword(const void* p) {
        int32_t x;
        __builtin_memcpy(&x, p, 4);
        return _mm512_set1_epi32(x);
    }
    // Two rows of codes 0 to 15 from the nibbles of a line.
    static I low_nibbles(I x) { return _mm512_and_si512(x, set_byte(15)); }
    static I high_nibbles(I x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), set_byte(15)); }
    // (code - 8) * kCentreScale as signed bytes.
    static I centred_low(I x) { return centred_high(_mm512_slli_epi16(x, 4)); }
    static I centred_high(I x) {
        return _mm512_ternarylogic_epi32(x, set_byte(0xf0), set_byte(0x80), 0x6a);
    }
    // sums + four products a lane: codes of the kind kUnsignedCodes says times signed bytes.
    static I dot_int4(I sums, I codes, I query) { return _mm512_dpbusd_epi32(sums, codes, query); }
    static I dot_int8(I sums, I codes, I query) { return _mm512_dpbusd_epi32(sums, codes, query); }
    // sums + four products a lane: probabilities times signed codes.
    static I dot_values(I sums, I probabilities, I codes) {
        return _mm512_dpbusd_epi32(sums, probabilities, codes);
    }
    // 16 lanes, rounded, as bytes.
    static void store_bytes(uint8_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm512_cvtusepi32_epi8(_mm512_cvtps_epi32(x)));
    }
    static void store_signed_bytes(int8_t* p, F x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                         _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x)));
    }
    // Four lines [16 tokens][4 bytes] to four rows [16 columns][4 tokens] of token quads 0 to 3;
    // column 4 k + j is byte j of line k.
    static void transpose_quads(I (&x)[4]) {
        const I bytes = _mm512_broadcast_i32x4(
            _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
        for (I& line : x) line = _mm512_shuffle_epi8(line, bytes);
        const I a = _mm512_shuffle_i32x4(x[0], x[1], 0x44),
                b = _mm512_shuffle_i32x4(x[2], x[3], 0x44);
        const I c = _mm512_shuffle_i32x4(x[0], x[1], 0xee),
                d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
        x[0] = _mm512_shuffle_i32x4(a, b, 0x88);
        x[1] = _mm512_shuffle_i32x4(a, b, 0xdd);
        x[2] = _mm512_shuffle_i32x4(c, d, 0x88);
        x[3] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    // Byte J of each dword, sign-extended, as float: token lanes of one channel of a line.
    template <int J>
    static F signed_byte(I x) {
        return to_float(_mm512_srai_epi32(_mm512_slli_epi32(x, 24 - 8 * J), 24));
    }
    template <int Shift, int Mask>
    static F field(I x) {
        return to_float(_mm512_and_si512(_mm512_srli_epi32(x, Shift), set_dword(Mask)));
    }
    static void transpose(F (&x)[16]) {  // 16 x 16 dwords
        __m512 t[16];
        for (int i = 0; i < 16; i += 2) {
            t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
            t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            for (int k = 0; k < 2; ++k) {
                const __m512d a = _mm512_castps_pd(t[i + k]), b = _mm512_castps_pd(t[i + 2 + k]);
                x[i + 2 * k] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
                x[i + 2 * k + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
            }
        }
        for (int i = 0; i < 4; ++i) {
            const __m512 a = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x88);
            const __m512 b = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x88);
            const __m512 c = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xdd);
            const __m512 d = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xdd);
            t[i] = _mm512_shuffle_f32x4(a, b, 0x88);
            t[i + 4] = _mm512_shuffle_f32x4(c, d, 0x88);
            t[i + 8] = _mm512_shuffle_f32x4(a, b, 0xdd);
            t[i + 12] = _mm512_shuffle_f32x4(c, d, 0xdd);
        }
        for (int i = 0; i < 16; ++i) x[i] = t[i];
    }
    // While one lives, numbers too small for a normal float are zero: computing with them would
    // take hundreds of cycles each.
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
