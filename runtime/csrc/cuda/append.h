// Append: normalises, rotates and encodes new tokens, a warp for each two groups of a token.
//
// The algorithm is that of quant/latent_cache.py. Sums run in the order of cpu/portable.cpp: lanes
// i, i + 16, i + 32, ... one after the other, then by halves; nothing is contracted. So the GPU
// writes the bytes that the CPU writes.
#pragma once

#include "cuda/record.h"
#include "cuda/sequence.h"

namespace mla::cuda {

constexpr int kHalfWarp = 16;
constexpr int kLevels = 15;                       // the largest 4-bit code
constexpr int kRounds = 3;                        // of codes and least-squares (scale, zero)
constexpr float kTiny = 1e-30f;                   // scales below count as zero
constexpr int kGroupValues = kGroup / kHalfWarp;  // that a lane has of a group

// Over the 16 lanes of a half-warp; all get it.
MLA_DEVICE float half_warp_sum(float x) {
    for (int mask = kHalfWarp / 2; mask; mask /= 2) x = add_exact(x, shuffle_xor(x, mask));
    return x;
}
MLA_DEVICE float half_warp_max(float x) {
    for (int mask = kHalfWarp / 2; mask; mask /= 2) x = max_of(x, shuffle_xor(x, mask));
    return x;
}

MLA_DEVICE float inverse_of(float scale) { return scale > kTiny ? div_exact(1.0f, scale) : 0.0f; }

MLA_DEVICE float nearest_code(float x, float zero, float inverse) {
    const float code = round_to_even(mul_exact(sub_exact(x, zero), inverse));
    return min_of(max_of(code, 0.0f), static_cast<float>(kLevels));
}

struct Affine {
    uint16_t scale, zero;  // fp16
};

// One group of 64, lane i of the half-warp holding x[j] = channel 16 j + i; its codes go to
// `codes`.
MLA_DEVICE Affine solve_affine(const float (&x)[kGroupValues], float (&codes)[kGroupValues]) {
    constexpr float kCount = kGroup;
    float low = x[0], high = x[0], sum = x[0];
    MLA_UNROLL
    for (int j = 1; j < kGroupValues; ++j) {
        low = min_of(low, x[j]);
        high = max_of(high, x[j]);
        sum = add_exact(sum, x[j]);
    }
    low = -half_warp_max(-low);
    high = half_warp_max(high);
    const float mean = div_exact(half_warp_sum(sum), kCount);
    float scale = div_exact(sub_exact(high, low), kLevels), zero = low, code_mean = 0;
    for (int round = 0; round < kRounds; ++round) {
        const float inverse = inverse_of(scale);
        float code_sum = 0;
        MLA_UNROLL
        for (int j = 0; j < kGroupValues; ++j) {
            codes[j] = nearest_code(x[j], zero, inverse);
            code_sum = add_exact(code_sum, codes[j]);
        }
        code_mean = div_exact(half_warp_sum(code_sum), kCount);
        float spread = 0, product = 0;
        MLA_UNROLL
        for (int j = 0; j < kGroupValues; ++j) {
            const float centred = sub_exact(codes[j], code_mean);
            spread = add_exact(spread, mul_exact(centred, centred));
            product = add_exact(product, mul_exact(centred, sub_exact(x[j], mean)));
        }
        spread = half_warp_sum(spread);
        product = half_warp_sum(product);
        if (spread > 0) scale = div_exact(product, max_of(spread, 1e-6f));
        zero = sub_exact(mean, mul_exact(scale, code_mean));
    }
    Affine stored;
    stored.scale = half_bits(scale);
    scale = half_value(stored.scale);
    stored.zero = half_bits(sub_exact(mean, mul_exact(scale, code_mean)));
    const float inverse = inverse_of(scale);
    MLA_UNROLL
    for (int j = 0; j < kGroupValues; ++j)
        codes[j] = nearest_code(x[j], half_value(stored.zero), inverse);
    return stored;
}

template <CacheFormat format>
struct Append {
    // A page's part, where the token goes.
    struct Place {
        Part part;
        uint8_t* page;
        int slot;

        MLA_DEVICE uint8_t* at(int value) const { return page + part_offset(part, slot, value); }
    };

    static MLA_DEVICE void store_half(const Place& place, int value, uint16_t bits) {
        store<uint16_t>(place.at(value), bits);
    }

    template <int Values>
    static MLA_DEVICE void store_symmetric(const float (&x)[Values], int first, int lane, int group,
                                           const Place& codes, const Place& scales) {
        float largest = 0;
        MLA_UNROLL
        for (int j = 0; j < Values; ++j) largest = max_of(largest, x[j] < 0 ? -x[j] : x[j]);
        const uint16_t scale = half_bits(div_exact(half_warp_max(largest), 127.0f));
        const float inverse = inverse_of(half_value(scale));
        if (lane == 0) store_half(scales, group, scale);
        MLA_UNROLL
        for (int j = 0; j < Values; ++j) {
            const float code = round_to_even(mul_exact(x[j], inverse));
            *codes.at(first + kHalfWarp * j + lane) =
                static_cast<uint8_t>(static_cast<int8_t>(min_of(max_of(code, -127.0f), 127.0f)));
        }
    }

    static MLA_DEVICE void store_int4(const float (&x)[kGroupValues], int lane, int group,
                                      const Place& codes, const Place& scales, const Place& zeros) {
        float code[kGroupValues];
        const Affine affine = solve_affine(x, code);
        if (lane == 0) {
            store_half(scales, group, affine.scale);
            store_half(zeros, group, affine.zero);
        }
        MLA_UNROLL
        for (int j = 0; j < kGroupValues; ++j) {
            const uint32_t mine = static_cast<uint32_t>(code[j]);
            const uint32_t other = shuffle_xor(mine, 4);  // four channels on, or back
            const int channel = kGroup * group + kHalfWarp * j + lane;
            if (channel % 8 < 4)
                *codes.at(channel / 8 * 4 + channel % 8) = static_cast<uint8_t>(mine | other << 4);
        }
    }

    static MLA_CONSTEXPR int latent_warps(const Params& p) { return p.rank / kGroup / 2; }
    static MLA_CONSTEXPR int rope_warps(const Params& p) { return (p.rope / kRopeGroup + 1) / 2; }

    // Warps that the new tokens of a round take.
    static MLA_CONSTEXPR int64_t warps(const Params& p) {
        return int64_t{p.batch} * p.round_steps * (latent_warps(p) + rope_warps(p));
    }

    // What warp `warp` of them does.
    static MLA_DEVICE void run(const Params& p, int64_t warp, int warp_lane) {
        if (warp >= warps(p)) return;
        const int share = static_cast<int>(warp % (latent_warps(p) + rope_warps(p)));
        const int64_t of_round = warp / (latent_warps(p) + rope_warps(p));
        const int b = static_cast<int>(of_round / p.round_steps);
        const int s = p.first_step + static_cast<int>(of_round % p.round_steps);
        const int64_t token = static_cast<int64_t>(b) * p.steps + s;
        const Sequence sequence = view_sequence(p, b);
        if (s >= sequence.fresh) return;
        const int position = sequence.past + s, slot = position % kPageTokens;
        const int64_t page = page_of(p, sequence, position / kPageTokens);
        const int lane = warp_lane % kHalfWarp, half = warp_lane / kHalfWarp;
        const int64_t first = token * p.kv.stride;

        const int rope_part = format == CacheFormat::kInt4   ? 3
                              : format == CacheFormat::kInt8 ? 2
                                                             : 1;
        const int groups = p.rank / kGroup;
        const auto place = [&](int index, Layout layout, int element_bytes, int width) {
            const Part part = {layout, element_bytes, width};
            return Place{part, p.parts[index] + page * part.page_bytes(), slot};
        };
        const bool is_float = format == CacheFormat::kFp16;
        const Place codes = is_float ? place(0, Layout::kRows, 2, p.rank)
                                     : place(0, Layout::kBlocked, 1,
                                             format == CacheFormat::kInt4 ? p.rank / 2 : p.rank);
        const Place scales = place(1, Layout::kColumns, 2, groups);

        if (share < latent_warps(p)) {  // the halves of the warp have a group each
            const float norm = norm_of(p, first, lane);
            const int group = 2 * share + half;
            float x[kGroupValues];
            load_reals(p.kv, first + kGroup * group + lane, kHalfWarp, x);
            MLA_UNROLL
            for (int j = 0; j < kGroupValues; ++j) x[j] = mul_exact(x[j], norm);
            if (format == CacheFormat::kInt4) {
                store_int4(x, lane, group, codes, scales, place(2, Layout::kColumns, 2, groups));
            } else if (format == CacheFormat::kInt8) {
                store_symmetric(x, kGroup * group, lane, group, codes, scales);
            } else {
                MLA_UNROLL
                for (int j = 0; j < kGroupValues; ++j)
                    store_half(codes, kGroup * group + kHalfWarp * j + lane, half_bits(x[j]));
            }
            return;
        }
        // Groups of 16 rope channels; there may be an odd number, so both halves take the last.
        const int rope_groups = p.rope / kRopeGroup;
        const int group = min_of(2 * (share - latent_warps(p)) + half, rope_groups - 1);
        const int channel = kRopeGroup * group + lane;
        const int64_t even = first + p.rank + channel / 2 * 2;
        const int64_t angle = token * (p.rope / 2) + channel / 2;
        const Floats2 rotated = rotate_pair(load_real(p.kv, even), load_real(p.kv, even + 1),
                                            p.cos[angle], p.sin[angle]);
        const float x[1] = {channel % 2 ? rotated.y : rotated.x};
        if (is_float) {
            store_half(place(1, Layout::kRows, 2, p.rope), channel, half_bits(x[0]));
        } else {
            store_symmetric(x, kRopeGroup * group, lane, group,
                            place(rope_part, Layout::kBlocked, 1, p.rope),
                            place(rope_part + 1, Layout::kColumns, 2, rope_groups));
        }
    }

    // 1 over the root mean square of a token's latent, in which every half-warp takes all of it.
    static MLA_DEVICE float norm_of(const Params& p, int64_t first, int lane) {
        if (p.norm_epsilon < 0) return 1;
        constexpr int kAtOnce = 16;  // the rank is a multiple of 16 of them
        float squares = 0;
        for (int i = 0; i < p.rank; i += kAtOnce * kHalfWarp) {
            float x[kAtOnce];
            load_reals(p.kv, first + i + lane, kHalfWarp, x);
            MLA_UNROLL
            for (int j = 0; j < kAtOnce; ++j) squares = add_exact(squares, mul_exact(x[j], x[j]));
        }
        const float mean = div_exact(half_warp_sum(squares), static_cast<float>(p.rank));
        return div_exact(1.0f, sqrt_exact(add_exact(mean, p.norm_epsilon)));
    }
};

}  // namespace mla::cuda
