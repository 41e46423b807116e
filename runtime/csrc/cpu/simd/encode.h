// Append: quantises tokens with vectors of sixteen lanes. The algorithm, and the order of every
// sum, are portable.cpp's, so that the bytes are the same.
#pragma once

#include <cmath>

#include "cpu/half.h"
#include "cpu/kernels.h"

namespace mla::cpu {
namespace {

template <class X>
struct Encoder {
    using F = typename X::F;
    static constexpr int kLanes = 16;

    static F inverse_of(float scale) { return X::set(scale > kTiny ? 1.0f / scale : 0.0f); }

    static F nearest_code(F x, F zero, F inverse) {
        const F code = X::round(X::mul(X::sub(x, zero), inverse));
        return X::min(X::max(code, X::set(0)), X::set(kLevels));
    }

    // As solve_group() in portable.cpp.
    template <int Vectors>
    static void solve_group(const float* x, uint8_t* codes, uint16_t* scale_bits,
                            uint16_t* zero_bits) {
        const float count = Vectors * kLanes;
        F v[Vectors], centred[Vectors], code[Vectors];
        for (int i = 0; i < Vectors; ++i) v[i] = X::load(x + i * kLanes);
        F low_lanes = v[0], high_lanes = v[0], sum = v[0];
        for (int i = 1; i < Vectors; ++i) {
            low_lanes = X::min(low_lanes, v[i]);
            high_lanes = X::max(high_lanes, v[i]);
            sum = X::add(sum, v[i]);
        }
        const float low = -X::highest(X::sub(X::set(0), low_lanes));
        const float high = X::highest(high_lanes);
        const float mean = X::sum(sum) / count;
        for (int i = 0; i < Vectors; ++i) centred[i] = X::sub(v[i], X::set(mean));
        float scale = (high - low) / kLevels, zero = low, code_mean = 0;
        for (int round = 0; round < kRounds; ++round) {
            const F inverse = inverse_of(scale), zeros = X::set(zero);
            for (int i = 0; i < Vectors; ++i) code[i] = nearest_code(v[i], zeros, inverse);
            F codes_sum = code[0];
            for (int i = 1; i < Vectors; ++i) codes_sum = X::add(codes_sum, code[i]);
            code_mean = X::sum(codes_sum) / count;
            F spread_lanes = X::set(0), product_lanes = X::set(0);
            for (int i = 0; i < Vectors; ++i) {
                const F code_centred = X::sub(code[i], X::set(code_mean));
                spread_lanes = X::add(spread_lanes, X::mul(code_centred, code_centred));
                product_lanes = X::add(product_lanes, X::mul(code_centred, centred[i]));
            }
            const float spread = X::sum(spread_lanes), product = X::sum(product_lanes);
            if (spread > 0) scale = product / (spread > 1e-6f ? spread : 1e-6f);
            zero = mean - scale * code_mean;
        }
        *scale_bits = float_to_half(scale);
        scale = half_to_float(*scale_bits);
        *zero_bits = float_to_half(mean - scale * code_mean);
        const F inverse = inverse_of(scale), zeros = X::set(half_to_float(*zero_bits));
        for (int i = 0; i < Vectors; ++i)
            X::store_bytes(codes + i * kLanes, nearest_code(v[i], zeros, inverse));
    }

    static void encode_int4(const Record& record, const PageView& page, int slot, const float* c) {
        uint8_t codes[64];
        for (int g = 0; g < record.groups; ++g) {
            const int first = g * record.group;
            uint16_t* scale = page.scale + g * kPageTokens + slot;
            uint16_t* zero = page.zero + g * kPageTokens + slot;
            if (record.group == 64)
                solve_group<4>(c + first, codes, scale, zero);
            else if (record.group == 32)
                solve_group<2>(c + first, codes, scale, zero);
            else
                solve_group<1>(c + first, codes, scale, zero);
            for (int i = 0; i < record.group; i += 8) {
                uint32_t low, high;
                __builtin_memcpy(&low, codes + i, 4);
                __builtin_memcpy(&high, codes + i + 4, 4);
                low |= high << 4;
                __builtin_memcpy(
                    page.codes + blocked_offset(record.rank / 2, slot, (first + i) / 2), &low, 4);
            }
        }
    }

    // Groups of a multiple of 16 by vectors, smaller ones (odd rope sizes) one by one.
    static void encode_int8(const float* x, int width, int group, int slot, uint8_t* part,
                            uint16_t* scales) {
        int8_t codes[64];
        for (int first = 0; first < width; first += group, scales += kPageTokens) {
            float largest = 0;
            if (group % kLanes == 0) {
                F lanes = X::abs(X::load(x + first));
                for (int i = kLanes; i < group; i += kLanes)
                    lanes = X::max(lanes, X::abs(X::load(x + first + i)));
                largest = X::highest(lanes);
            } else {
                for (int i = 0; i < group; ++i) {
                    const float size = x[first + i] < 0 ? -x[first + i] : x[first + i];
                    if (size > largest) largest = size;
                }
            }
            scales[slot] = float_to_half(largest / 127);
            const F inverse = inverse_of(half_to_float(scales[slot]));
            const F limit = X::set(127), lower = X::set(-127);
            for (int i = 0; i < group; i += kLanes) {
                float tail[kLanes] = {};
                const float* from = x + first + i;
                if (group < kLanes) {
                    for (int j = 0; j < group; ++j) tail[j] = from[j];
                    from = tail;
                }
                const F code = X::round(X::mul(X::load(from), inverse));
                X::store_signed_bytes(codes + i, X::min(X::max(code, lower), limit));
            }
            for (int i = 0; i < group; i += 4)
                __builtin_memcpy(part + blocked_offset(width, slot, first + i), codes + i, 4);
        }
    }

    static void encode_rows(const Record& record, void* rows, int width, int slot, const float* x) {
        if (record.format == CacheFormat::kFp32) {
            __builtin_memcpy(static_cast<float*>(rows) + int64_t{slot} * width, x,
                             sizeof(float) * static_cast<size_t>(width));
            return;
        }
        uint16_t* row = static_cast<uint16_t*>(rows) + int64_t{slot} * width;
        int i = 0;
        for (; i + kLanes <= width; i += kLanes) X::store_half(row + i, X::load(x + i));
        for (; i < width; ++i) row[i] = float_to_half(x[i]);
    }

    static void encode(const EncodeTask& task) {
        const Record& record = *task.record;
        const int rank = record.rank, pairs = record.rope / 2;
        alignas(64) float c[1024], k_pe[128];
        for (int t = 0; t < task.tokens; ++t) {
            const float* kv = task.kv + t * task.kv_stride;
            float norm = 1;
            if (task.epsilon >= 0) {
                F squares = X::set(0);
                for (int i = 0; i < rank; i += kLanes)
                    squares = X::add(squares, X::mul(X::load(kv + i), X::load(kv + i)));
                const float mean = X::sum(squares) / static_cast<float>(rank);
                norm = 1.0f / __builtin_sqrtf(mean + task.epsilon);
            }
            for (int i = 0; i < rank; i += kLanes)
                X::store(c + i, X::mul(X::load(kv + i), X::set(norm)));
            const float* cos = task.cos + int64_t{t} * pairs;
            const float* sin = task.sin + int64_t{t} * pairs;
            for (int i = 0; i < pairs; ++i) {
                const float even = kv[rank + 2 * i], odd = kv[rank + 2 * i + 1];
                k_pe[2 * i] = even * cos[i] - odd * sin[i];
                k_pe[2 * i + 1] = even * sin[i] + odd * cos[i];
            }
            const int64_t position = task.position + t;
            const PageView page = view_page(record, task.pages[position / kPageTokens]);
            const int slot = static_cast<int>(position % kPageTokens);
            if (record.is_float()) {
                encode_rows(record, page.c_rows, rank, slot, c);
                encode_rows(record, page.pe_rows, record.rope, slot, k_pe);
                continue;
            }
            if (record.format == CacheFormat::kInt4)
                encode_int4(record, page, slot, c);
            else
                encode_int8(c, rank, record.group, slot, page.codes, page.scale);
            encode_int8(k_pe, record.rope, record.rope_group, slot,
                        reinterpret_cast<uint8_t*>(page.pe_codes), page.pe_scale);
        }
    }
};

}  // namespace
}  // namespace mla::cpu
