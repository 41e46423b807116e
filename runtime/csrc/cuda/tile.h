// A tile: `tokens` neighbouring tokens of one page in shared memory, brought by asynchronous copies
// of 16 bytes. Chunks are permuted on the way, so that the lanes of a warp that read a fragment
// (formats.h) come to 32 different banks:
//
//   blocked   chunk c (four tokens) of line k lies at c ^ 2 (k / 2 % 2)
//   rows      chunk c (eight halves) of token t lies at c ^ spread(t)
//   columns   in order; each column holds `tokens` halves and 16 bytes that nobody uses
#pragma once

#include "cuda/record.h"

namespace mla::cuda {

constexpr int kChunk = 16;

MLA_DEVICE uint32_t blocked_chunk(uint32_t line, uint32_t chunk) {
    return chunk ^ (line >> 1 & 1) << 1;
}

// Even numbers below 8 that differ for any four tokens 0 to 3, 4 to 7, or 0, 2, 4, 6, or 1, 3,
// 5, 7.
MLA_DEVICE uint32_t spread(uint32_t token) { return ((token ^ token >> 2) & 3) << 1; }

// Calls body(i) for this thread's share of 0 to count - 1, and `count` is at most `Most`: straight
// code, as that is known when compiling.
template <int Threads, int Most, class Body>
MLA_DEVICE void share_out(int count, int thread, const Body& body) {
    MLA_UNROLL
    for (int first = 0; first < Most; first += Threads)
        if (first + Threads <= count || first + thread < count)
            body(static_cast<uint32_t>(first + thread));
}

// Where in the tile: bytes from the part's start there. Unsigned, because a signed division by a
// power of two takes four instructions.
template <int Tokens>
struct TilePart {
    static constexpr int kColumnBytes = Tokens * 2 + kChunk;

    // Word (four values) of token `slot` of block `block`, in line `first` + `line`, of `lines` a
    // block. `first` is a multiple of 4, which leaves the permutation to `line`: then compilers see
    // that addresses differ by constants.
    static MLA_DEVICE uint32_t blocked(uint32_t lines, uint32_t block, uint32_t first,
                                       uint32_t line, uint32_t slot) {
        return (block * lines + first + line) * kLineBytes +
               blocked_chunk(line, slot / 4) * kChunk + slot % 4 * 4;
    }
    static MLA_DEVICE uint32_t column(uint32_t column, uint32_t token) {
        return column * kColumnBytes + token * 2;
    }
    // Halves from `value` (a multiple of 4) of `token`, of `width` halves a token.
    static MLA_DEVICE uint32_t row(uint32_t width, uint32_t token, uint32_t value) {
        const uint32_t chunks = width / 8;
        const uint32_t chunk = value / 8 ^ (spread(token) & (chunks - 1));
        return (token * chunks + chunk) * kChunk + value % 8 * 2;
    }

    static MLA_CONSTEXPR int bytes(const Part& part) {
        return part.width *
               (part.layout == Layout::kColumns ? kColumnBytes : part.element_bytes * Tokens);
    }

    // Chunks first + thread, those `Threads` on, and so forth, of `count`, which is `Most` at most.
    template <int Threads, int Most, int First>
    static MLA_DEVICE void copy_chunks(int count, int thread, const uint8_t* from, uint8_t* to) {
        if constexpr (First < Most) {
            if (First + Threads <= count || First + thread < count)
                copy_async_at<First * kChunk>(to, from);
            copy_chunks<Threads, Most, First + Threads>(count, thread, from, to);
        }
    }

    // Starts the copies of one thread. The part's width is at most MaxWidth. `page`: the part's
    // page; `first`: the tile's first token there; `valid`: tokens of the tile that exist. What
    // decides their value becomes zeros in the others, whatever the arena holds there: columns and
    // rows; codes alone do nothing.
    template <int Threads, int MaxWidth>
    static MLA_DEVICE void copy(const Part& part, const uint8_t* page, uint32_t first, int valid,
                                int thread, uint8_t* tile) {
        const int width = part.width;
        if (part.layout == Layout::kBlocked) {
            // Threads are a multiple of 16, so that all chunks of a thread are permuted alike.
            const uint32_t lines = width / 4, mine = thread * kChunk;
            const uint8_t* from = page + first / kBlockTokens * lines * kLineBytes + mine;
            uint8_t* to = tile + mine / kLineBytes * kLineBytes +
                          blocked_chunk(thread / 4, thread % 4) * kChunk;
            copy_chunks<Threads, Tokens / 4 * (MaxWidth / 4), 0>(Tokens / 4 * lines, thread, from,
                                                                 to);
        } else if (part.layout == Layout::kColumns) {
            constexpr uint32_t kChunks = Tokens / 8;
            share_out<Threads, MaxWidth * kChunks>(width * kChunks, thread, [&](uint32_t i) {
                const uint32_t token = i % kChunks * 8;
                const int left = valid - static_cast<int>(token);
                copy_async(tile + column(i / kChunks, token),
                           page + (i / kChunks * kPageTokens + first + token) * 2,
                           min_of(max_of(left, 0), 8) * 2);
            });
        } else {
            const uint32_t chunks = width / 8;
            const uint8_t* from = page + first * width * 2;
            // There are many, and each address would take registers.
            MLA_NO_UNROLL
            for (uint32_t i = thread; i < Tokens * chunks; i += Threads) {
                const uint32_t token = i / chunks;
                copy_async(tile + row(width, token, i % chunks * 8), from + i * kChunk,
                           static_cast<int>(token) < valid ? kChunk : 0);
            }
        }
    }
};

}  // namespace mla::cuda
