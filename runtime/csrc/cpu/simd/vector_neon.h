// Sixteen lanes on NEON: four registers. The contract is vector_avx512.h's; with
// __ARM_FEATURE_DOTPROD the byte dots are sdot.
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace mla::cpu {
namespace {

struct Neon {
    struct F {
        float32x4_t v[4];
    };
    struct I {
        int8x16_t v[4];
    };

    static constexpr bool kUnsignedCodes = false;
    static constexpr int kPairSteps = 0;
    static constexpr int kMaxProbability = 127;  // sdot: both sides signed
    static constexpr int kCentreScale = 1;
    static constexpr int kScoreRows = 4;
    static constexpr int kScoreBlocks = 1;
    static constexpr int kValueRows = 2;
    static constexpr int kValueColumns = 2;
    static constexpr int kFloatRows = 4;
    static constexpr int kFloatColumns = 1;

    template <class Op>
    static F each(const Op& op) {
        return {{op(0), op(1), op(2), op(3)}};
    }
    template <class Op>
    static I bytes(const Op& op) {
        return {{op(0), op(1), op(2), op(3)}};
    }
    static int32x4_t dwords(int8x16_t x) { return vreinterpretq_s32_s8(x); }
    static int8x16_t as_bytes(int32x4_t x) { return vreinterpretq_s8_s32(x); }

    static F load(const float* p) {
        return each([&](int i) { return vld1q_f32(p + 4 * i); });
    }
    static void store(float* p, F x) {
        for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.v[i]);
    }
    static F set(float x) {
        return each([&](int) { return vdupq_n_f32(x); });
    }
    static F add(F x, F y) {
        return each([&](int i) { return vaddq_f32(x.v[i], y.v[i]); });
    }
    static F sub(F x, F y) {
        return each([&](int i) { return vsubq_f32(x.v[i], y.v[i]); });
    }
    static F mul(F x, F y) {
        return each([&](int i) { return vmulq_f32(x.v[i], y.v[i]); });
    }
    static F fma(F x, F y, F z) {
        return each([&](int i) { return vfmaq_f32(z.v[i], x.v[i], y.v[i]); });
    }
    static F min(F x, F y) {
        return each([&](int i) { return vminq_f32(x.v[i], y.v[i]); });
    }
    static F max(F x, F y) {
        return each([&](int i) { return vmaxq_f32(x.v[i], y.v[i]); });
    }
    static F abs(F x) {
        return each([&](int i) { return vabsq_f32(x.v[i]); });
    }
    static F round(F x) {
        return each([&](int i) { return vrndnq_f32(x.v[i]); });
    }
    static F select_greater(F x, F y, F then, F otherwise) {
        return each(
            [&](int i) { return vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), then.v[i], otherwise.v[i]); });
    }
    static F first_lanes(int count, F x, F y) {
        const int32x4_t lanes = {0, 1, 2, 3};
        return each([&](int i) {
            return vbslq_f32(vcltq_s32(lanes, vdupq_n_s32(count - 4 * i)), x.v[i], y.v[i]);
        });
    }
    static float sum(F x) {  // by halves: 8, 4, 2, 1
        const float32x4_t a = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
        const float32x2_t b = vadd_f32(vget_low_f32(a), vget_high_f32(a));
        return vget_lane_f32(b, 0) + vget_lane_f32(b, 1);
    }
    static float highest(F x) {
        return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3])));
    }
    static F load_half(const uint16_t* p) {
        return each([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); });
    }
    static void store_half(uint16_t* p, F x) {
        for (int i = 0; i < 4; ++i) vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i])));
    }
    static F load_bf16(const uint16_t* p) {
        return each(
            [&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
    }
    static F load_int8(const int8_t* p) {
        const int8x16_t x = vld1q_s8(p);
        const int16x8_t low = vmovl_s8(vget_low_s8(x)), high = vmovl_s8(vget_high_s8(x));
        return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))),
                 vcvtq_f32_s32(vmovl_s16(vget_high_s16(low))),
                 vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))),
                 vcvtq_f32_s32(vmovl_s16(vget_high_s16(high)))}};
    }
    static F bf16_low(I x) {
        return each([&](int i) { return vreinterpretq_f32_s32(vshlq_n_s32(dwords(x.v[i]), 16)); });
    }
    static F bf16_high(I x) {
        return each([&](int i) {
            return vreinterpretq_f32_u32(
                vandq_u32(vreinterpretq_u32_s8(x.v[i]), vdupq_n_u32(0xffff0000u)));
        });
    }
    static F exp2(F x) {
        return each([&](int i) {
            const float32x4_t bounded = vmaxq_f32(x.v[i], vdupq_n_f32(-126));
            const float32x4_t whole = vrndnq_f32(bounded), part = vsubq_f32(bounded, whole);
            float32x4_t y = vdupq_n_f32(0.0013333558f);
            y = vfmaq_f32(vdupq_n_f32(0.0096181291f), y, part);
            y = vfmaq_f32(vdupq_n_f32(0.0555041087f), y, part);
            y = vfmaq_f32(vdupq_n_f32(0.2402265070f), y, part);
            y = vfmaq_f32(vdupq_n_f32(0.6931471806f), y, part);
            y = vfmaq_f32(vdupq_n_f32(1.0f), y, part);
            const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(whole), 23);
            const uint32x4_t power =
                vreinterpretq_u32_s32(vaddq_s32(vreinterpretq_s32_f32(y), exponent));
            return vreinterpretq_f32_u32(vandq_u32(power, vcgtq_f32(x.v[i], vdupq_n_f32(-100))));
        });
    }
    static F to_float(I x) {
        return each([&](int i) { return vcvtq_f32_s32(dwords(x.v[i])); });
    }

    static I load(const void* p) {
        return bytes([&](int i) { return vld1q_s8(static_cast<const int8_t*>(p) + 16 * i); });
    }
    static void store(void* p, I x) {
        for (int i = 0; i < 4; ++i) vst1q_s8(static_cast<int8_t*>(p) + 16 * i, x.v[i]);
    }
    static I set_byte(int x) {
        return bytes([&](int) { return vdupq_n_s8(static_cast<int8_t>(x)); });
    }
    static I zero() { return set_byte(0); }
    static I xor_(I x, I y) {
        return bytes([&](int i) { return veorq_s8(x.v[i], y.v[i]); });
    }
    static I add_dwords(I x, I y) {
        return bytes([&](int i) { return as_bytes(vaddq_s32(dwords(x.v[i]), dwords(y.v[i]))); });
    }
    template <int N>
    static I shift_left_dwords(I x) {
        return bytes([&](int i) { return as_bytes(vshlq_n_s32(dwords(x.v[i]), N)); });
    }
    static I broadcast_dword(const void* p) {
        int32_t x;
        __builtin_memcpy(&x, p, 4);
        return bytes([&](int) { return as_bytes(vdupq_n_s32(x)); });
    }
    static I low_nibbles(I x) {
        return bytes([&](int i) { return vandq_s8(x.v[i], vdupq_n_s8(15)); });
    }
    static I high_nibbles(I x) {
        return bytes(
            [&](int i) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(x.v[i]), 4)); });
    }
    static I centred(I codes) {
        return bytes([&](int i) { return vsubq_s8(codes.v[i], vdupq_n_s8(8)); });
    }
    static I centred_low(I x) { return centred(low_nibbles(x)); }
    static I centred_high(I x) { return centred(high_nibbles(x)); }

    static int8x16_t dot(int8x16_t sums, int8x16_t x, int8x16_t y) {
#if defined(__ARM_FEATURE_DOTPROD)
        return as_bytes(vdotq_s32(dwords(sums), x, y));
#else
        const int16x8_t low = vmull_s8(vget_low_s8(x), vget_low_s8(y));
        const int16x8_t high = vmull_s8(vget_high_s8(x), vget_high_s8(y));
        const int32x4_t four = vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
        return as_bytes(vaddq_s32(dwords(sums), four));
#endif
    }
    static I dot_int4(I sums, I codes, I query) {
        return bytes([&](int i) { return dot(sums.v[i], codes.v[i], query.v[i]); });
    }
    static I dot_int8(I sums, I codes, I query) { return dot_int4(sums, codes, query); }
    static I dot_values(I sums, I probabilities, I codes) {
        return dot_int4(sums, probabilities, codes);
    }
    static int16x8_t to_words(float32x4_t a, float32x4_t b) {
        return vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a)), vqmovn_s32(vcvtnq_s32_f32(b)));
    }
    static void store_bytes(uint8_t* p, F x) {
        vst1q_u8(p, vcombine_u8(vqmovun_s16(to_words(x.v[0], x.v[1])),
                                vqmovun_s16(to_words(x.v[2], x.v[3]))));
    }
    static void store_signed_bytes(int8_t* p, F x) {
        vst1q_s8(p, vcombine_s8(vqmovn_s16(to_words(x.v[0], x.v[1])),
                                vqmovn_s16(to_words(x.v[2], x.v[3]))));
    }
    static void transpose_quads(I (&x)[4]) {
        const uint8x16_t order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
        I q[4];
        for (int quad = 0; quad < 4; ++quad)
            for (int line = 0; line < 4; ++line)
                q[quad].v[line] = vqtbl1q_s8(x[line].v[quad], order);
        for (int i = 0; i < 4; ++i) x[i] = q[i];
    }
    template <int J>
    static F signed_byte(I x) {
        return each([&](int i) {
            return vcvtq_f32_s32(vshrq_n_s32(vshlq_n_s32(dwords(x.v[i]), 24 - 8 * J), 24));
        });
    }
    template <int Shift, int Mask>
    static F field(I x) {
        return each([&](int i) {
            uint32x4_t y = vreinterpretq_u32_s8(x.v[i]);
            if constexpr (Shift > 0) y = vshrq_n_u32(y, Shift);
            return vcvtq_f32_u32(vandq_u32(y, vdupq_n_u32(Mask)));
        });
    }
    static void transpose(F (&x)[16]) {
        F y[16];
        for (int r = 0; r < 4; ++r)
            for (int c = 0; c < 4; ++c) {
                const float32x4_t a = x[4 * r].v[c], b = x[4 * r + 1].v[c];
                const float32x4_t d = x[4 * r + 2].v[c], e = x[4 * r + 3].v[c];
                const float64x2_t p = vreinterpretq_f64_f32(vtrn1q_f32(a, b));
                const float64x2_t q = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
                const float64x2_t s = vreinterpretq_f64_f32(vtrn1q_f32(d, e));
                const float64x2_t t = vreinterpretq_f64_f32(vtrn2q_f32(d, e));
                y[4 * c].v[r] = vreinterpretq_f32_f64(vtrn1q_f64(p, s));
                y[4 * c + 1].v[r] = vreinterpretq_f32_f64(vtrn1q_f64(q, t));
                y[4 * c + 2].v[r] = vreinterpretq_f32_f64(vtrn2q_f64(p, s));
                y[4 * c + 3].v[r] = vreinterpretq_f32_f64(vtrn2q_f64(q, t));
            }
        for (int i = 0; i < 16; ++i) x[i] = y[i];
    }
    // See vector_avx512.h.
    class FlushDenormals {
      public:
        FlushDenormals() : saved_(get()) { set(saved_ | (uint64_t{1} << 24)); }
        ~FlushDenormals() { set(saved_); }

      private:
        static uint64_t get() {
            uint64_t control;
            __asm__ volatile("mrs %0, fpcr" : "=r"(control));
            return control;
        }
        static void set(uint64_t control) { __asm__ volatile("msr fpcr, %0" ::"r"(control)); }
        uint64_t saved_;
    };
    static void prefetch(const void* p) { __builtin_prefetch(p); }
};

}  // namespace
}  // namespace mla::cpu
