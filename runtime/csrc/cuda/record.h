// The cache record of docs/cache-record.md as sizes and addresses of a page.
//
//   blocked [4][width / 4][16][4]   a line: 16 tokens, four values each, 64 bytes
//   columns [width][64]             one value of the 64 tokens
//   rows    [64][width]
#pragma once

#include "cuda/device.h"
#include "cuda/params.h"

namespace mla::cuda {

enum class Layout { kBlocked, kColumns, kRows };

constexpr int kLineBytes = 64;
constexpr int kBlockTokens = 16;

// One array of a record: `width` values a token.
struct Part {
    Layout layout;
    int element_bytes;
    int width;

    MLA_CONSTEXPR int64_t page_bytes() const {
        return static_cast<int64_t>(element_bytes) * width * kPageTokens;
    }
};

// Where value `value` of the token in slot `slot` of a page starts, in bytes.
MLA_DEVICE int part_offset(const Part& part, int slot, int value) {
    if (part.layout == Layout::kBlocked) {
        const int line = slot / kBlockTokens * (part.width / 4) + value / 4;
        return line * kLineBytes + slot % kBlockTokens * 4 + value % 4;
    }
    if (part.layout == Layout::kColumns) return (value * kPageTokens + slot) * part.element_bytes;
    return (slot * part.width + value) * part.element_bytes;
}

}  // namespace mla::cuda
