// A page as floats: both as rows (a token's channels side by side) and as columns (a channel's
// tokens side by side), for the exact kernels and for the expanded mode.
#pragma once

#include "cpu/half.h"
#include "cpu/kernels.h"

namespace mla::cpu {
namespace {

template <class X>
struct Decoder {
    using F = typename X::F;
    using I = typename X::I;

    // fp16 columns [count, 64] as floats; slots from `valid` on as zeros, so that nothing depends
    // on what a rewound sequence left there.
    static void load_columns(const uint16_t* from, int count, int valid, float* to) {
        for (int i = 0; i < count; ++i)
            for (int t = 0; t < kPageTokens; t += kBlockTokens) {
                F x = X::load_half(from + i * kPageTokens + t);
                if (valid < t + kBlockTokens)
                    x = X::first_lanes(valid > t ? valid - t : 0, x, X::set(0));
                X::store(to + i * kPageTokens + t, x);
            }
    }

    // Codes of a BLOCKED int8 part to columns [width, 64].
    static void decode_int8(const uint8_t* codes, const float* scale, int width, int group,
                            float* columns) {
        for (int block = 0; block < kBlocks; ++block)
            for (int k = 0; k < width / 4; ++k) {
                const I line = X::load(
                    static_cast<const void*>(codes + (int64_t{block} * (width / 4) + k) * kLine));
                const int t = block * kBlockTokens;
                const F s = X::load(scale + 4 * k / group * kPageTokens + t);
                float* to = columns + int64_t{4} * k * kPageTokens + t;
                X::store(to, X::mul(X::template signed_byte<0>(line), s));
                X::store(to + kPageTokens, X::mul(X::template signed_byte<1>(line), s));
                X::store(to + 2 * kPageTokens, X::mul(X::template signed_byte<2>(line), s));
                X::store(to + 3 * kPageTokens, X::mul(X::template signed_byte<3>(line), s));
            }
    }

    static void decode_int4(const Record& record, const uint8_t* codes, const float* scale,
                            const float* zero, float* columns) {
        const int lines = record.rank / 8;
        for (int block = 0; block < kBlocks; ++block)
            for (int k = 0; k < lines; ++k) {
                const I line =
                    X::load(static_cast<const void*>(codes + (int64_t{block} * lines + k) * kLine));
                const int t = block * kBlockTokens;
                const int g = 8 * k / record.group * kPageTokens + t;
                const F s = X::load(scale + g), z = X::load(zero + g);
                float* to = columns + int64_t{8} * k * kPageTokens + t;
                const auto put = [&](int channel, F code) {
                    X::store(to + channel * kPageTokens, X::fma(code, s, z));
                };
                put(0, X::template field<0, 15>(line));
                put(1, X::template field<8, 15>(line));
                put(2, X::template field<16, 15>(line));
                put(3, X::template field<24, 15>(line));
                put(4, X::template field<4, 15>(line));
                put(5, X::template field<12, 15>(line));
                put(6, X::template field<20, 15>(line));
                put(7, X::template field<28, 15>(line));
            }
    }

    static void decode_pe(const Record& record, const PageView& view, int valid, float* scale,
                          float* columns) {
        load_columns(view.pe_scale, record.rope_groups, valid, scale);
        decode_int8(reinterpret_cast<const uint8_t*>(view.pe_codes), scale, record.rope,
                    record.rope_group, columns);
    }

    // to [columns, ldt] = from [rows, ldf] transposed; rows a multiple of 16, columns of 4.
    static void transpose(const float* from, int64_t ldf, int rows, int columns, float* to,
                          int64_t ldt) {
        for (int r = 0; r < rows; r += 16) {
            int c = 0;
            for (; c + 16 <= columns; c += 16) {
                F x[16];
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) x[i] = X::load(from + (r + i) * ldf + c);
                X::transpose(x);
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) X::store(to + (c + i) * ldt + r, x[i]);
            }
            for (; c < columns; ++c)
                for (int i = 0; i < 16; ++i) to[c * ldt + r + i] = from[(r + i) * ldf + c];
        }
    }

    static void load_rows(CacheFormat format, const void* rows, int width, int valid, float* to) {
        for (int t = 0; t < kPageTokens; ++t, to += width) {
            const int64_t at = int64_t{t} * width;
            if (t >= valid) {
                for (int i = 0; i < width; ++i) to[i] = 0;
            } else if (format == CacheFormat::kFp32) {
                __builtin_memcpy(to, static_cast<const float*>(rows) + at, sizeof(float) * width);
            } else {
                const uint16_t* row = static_cast<const uint16_t*>(rows) + at;
                int i = 0;
                for (; i + 16 <= width; i += 16) X::store(to + i, X::load_half(row + i));
                for (; i < width; ++i) to[i] = half_to_float(row[i]);
            }
        }
    }

    // Floats of scratch that decode_page wants.
    static size_t scratch_floats(const Record& record) {
        return static_cast<size_t>(kPageTokens) *
               (2 * record.groups + record.rope_groups + record.rope);
    }

    // The first `valid` tokens of a page, zeros after them: c_rows [64, D], c_columns [D, 64],
    // pe_columns [R, 64].
    static void decode_page(const Record& record, const PageView& view, int valid, float* c_rows,
                            float* c_columns, float* pe_columns, float* scratch) {
        if (record.is_float()) {
            load_rows(record.format, view.c_rows, record.rank, valid, c_rows);
            load_rows(record.format, view.pe_rows, record.rope, valid, scratch);
            transpose(c_rows, record.rank, kPageTokens, record.rank, c_columns, kPageTokens);
            transpose(scratch, record.rope, kPageTokens, record.rope, pe_columns, kPageTokens);
            return;
        }
        float* scale = scratch;
        float* zero = scale + record.groups * kPageTokens;
        float* pe_scale = zero + record.groups * kPageTokens;
        load_columns(view.scale, record.groups, valid, scale);
        if (record.format == CacheFormat::kInt4) {
            load_columns(view.zero, record.groups, valid, zero);
            decode_int4(record, view.codes, scale, zero, c_columns);
        } else {
            decode_int8(view.codes, scale, record.rank, record.group, c_columns);
        }
        decode_pe(record, view, valid, pe_scale, pe_columns);
        transpose(c_columns, kPageTokens, record.rank, kPageTokens, c_rows, record.rank);
    }
};

}  // namespace
}  // namespace mla::cpu
