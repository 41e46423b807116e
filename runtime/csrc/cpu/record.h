// The bytes of latent_attention.h's cache record, as addresses: internal to the kernels.
//
// Everything here has internal linkage: the file is compiled once per instruction set, and the
// linker must never take one set's copy of a function for another's.
#pragma once

#include <cstdint>

#include "cpu/latent_attention.h"

namespace mla::cpu {
namespace {

constexpr int kBlockTokens = 16;
constexpr int kBlocks = kPageTokens / kBlockTokens;
constexpr int kLine = 64;        // bytes of a BLOCKED line: 16 tokens, 4 values each
constexpr int kLevels = 15;      // the largest 4-bit code
constexpr int kRounds = 3;       // of codes and least-squares (scale, zero)
constexpr float kTiny = 1e-30f;  // scales below count as zero

inline int group_size(int width, int largest) {
    while (width % largest) largest /= 2;
    return largest;
}

}  // namespace

// Sizes that follow from (format, D, R).
struct Record {
    CacheFormat format;
    int rank, group, groups;            // latent channels, channels a group, groups
    int rope, rope_group, rope_groups;  // the same of the rope key
    int64_t page_bytes[kMaxParts];
    uint8_t* parts[kMaxParts];

    bool is_float() const { return format == CacheFormat::kFp16 || format == CacheFormat::kFp32; }
};

// One page's parts. What the format lacks is null.
struct PageView {
    uint8_t* codes;      // int4 [4][D / 8][16][4], int8 [4][D / 4][16][4]
    uint16_t* scale;     // [D / group][64] fp16
    uint16_t* zero;      // [D / group][64] fp16
    int8_t* pe_codes;    // [4][R / 4][16][4]
    uint16_t* pe_scale;  // [R / rope_group][64] fp16
    void* c_rows;        // [64][D] fp16 or fp32
    void* pe_rows;       // [64][R] fp16 or fp32
};

namespace {

inline PageView view_page(const Record& record, int64_t page) {
    PageView view = {};
    uint8_t* at[kMaxParts] = {};
    for (int p = 0; p < kMaxParts; ++p)
        if (record.parts[p]) at[p] = record.parts[p] + page * record.page_bytes[p];
    if (record.is_float()) {
        view.c_rows = at[0];
        view.pe_rows = at[1];
        return view;
    }
    const int rope_part = record.format == CacheFormat::kInt4 ? 3 : 2;
    view.codes = at[0];
    view.scale = reinterpret_cast<uint16_t*>(at[1]);
    if (record.format == CacheFormat::kInt4) view.zero = reinterpret_cast<uint16_t*>(at[2]);
    view.pe_codes = reinterpret_cast<int8_t*>(at[rope_part]);
    view.pe_scale = reinterpret_cast<uint16_t*>(at[rope_part + 1]);
    return view;
}

// Byte offset of `channel` of token `slot` in a BLOCKED part with `width` values a token.
inline int64_t blocked_offset(int width, int slot, int value) {
    const int block = slot / kBlockTokens, lane = slot % kBlockTokens;
    return (static_cast<int64_t>(block) * (width / 4) + value / 4) * kLine + lane * 4 + value % 4;
}

}  // namespace
}  // namespace mla::cpu
