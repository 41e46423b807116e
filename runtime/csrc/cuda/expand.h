// From the cache to the keys and values of every head, for a chunk of each sequence's tokens:
//
//     Unpack   c_kv, k_pe          decoded to half
//     Expand   keys_h   = c_kv w_uk_h^T
//              values_h = c_kv w_uv_h
//
// Made are the tokens that some row of the round sees, up to a multiple of kExpandTokens; what lies
// behind a sequence there is zeros.
#pragma once

#include "cuda/panel.h"
#include "cuda/sequence.h"

namespace mla::cuda {

constexpr int kExpandTokens = 128;

// Whether a row of the round sees any of the kExpandTokens around token `token` of the chunk.
MLA_DEVICE bool is_seen(const Params& p, const Sequence& sequence, int token) {
    const int last_step = min_of(sequence.fresh, p.first_step + p.round_steps);
    return last_step > p.first_step &&
           p.first_token + token / kExpandTokens * kExpandTokens < sequence.past + last_step;
}

// Eight halves from eight numbers, which without a latent norm may be beyond half's range.
template <class Number>
MLA_DEVICE Words4 pack_eight(const Number& number) {
    const auto pair = [&](int i) {
        return pack_half2(in_range(number(i)), in_range(number(i + 1)));
    };
    return {pair(0), pair(2), pair(4), pair(6)};
}

template <CacheFormat format>
struct Unpack {
    static constexpr int kThreads = 128;
    static constexpr int kMinBlocks = 8;
    static constexpr int kSharedBytes = 0;

    // Grid: x blocks of 16 tokens of the chunk, y 1, z sequences. Neighbouring threads have
    // neighbouring tokens, as a line of the cache does.
    static MLA_DEVICE void run(const Params& p, const Thread& thread) {
        const int b = thread.block_z, slot = thread.index % kBlockTokens;
        const int token = thread.block_x * kBlockTokens + slot;
        const Sequence sequence = view_sequence(p, b);
        if (!is_seen(p, sequence, token)) return;
        const int position = p.first_token + token;
        const bool exists = position < sequence.length();
        const int64_t page = exists ? page_of(p, sequence, position / kPageTokens) : 0;
        const int64_t at = int64_t{b} * p.chunk_tokens + token;
        const int eights = p.rank / 8, all = eights + p.rope / 8;
        for (int i = thread.index / kBlockTokens; i < all; i += kThreads / kBlockTokens) {
            Words4 x = {0, 0, 0, 0};
            if (exists)
                x = i < eights ? latent(p, page, position % kPageTokens, i)
                               : rope_key(p, page, position % kPageTokens, i - eights);
            store<Words4>(
                i < eights ? p.c_kv + at * p.rank + 8 * i : p.k_pe + at * p.rope + 8 * (i - eights),
                x);
        }
    }

    static MLA_DEVICE const uint8_t* find(const Params& p, int index, int64_t page,
                                          const Part& part, int slot, int value) {
        return p.parts[index] + page * part.page_bytes() + part_offset(part, slot, value);
    }
    static MLA_DEVICE float number(const Params& p, int index, int64_t page, int groups, int slot,
                                   int group) {
        const Part part = {Layout::kColumns, 2, groups};
        return half_value(load<uint16_t>(find(p, index, page, part, slot, group)));
    }

    // Channels 8 i to 8 i + 7, in signed bytes, of a part whose scales are the next one.
    static MLA_DEVICE Words4 bytes(const Params& p, int index, int64_t page, int width, int group,
                                   int slot, int i) {
        const Part part = {Layout::kBlocked, 1, width};
        const uint32_t words[2] = {load<uint32_t>(find(p, index, page, part, slot, 8 * i)),
                                   load<uint32_t>(find(p, index, page, part, slot, 8 * i + 4))};
        const float scale = number(p, index + 1, page, width / group, slot, 8 * i / group);
        return pack_eight([&](int channel) {
            const uint32_t byte = words[channel / 4] >> (8 * (channel % 4));
            return scale * static_cast<int8_t>(byte);
        });
    }

    static MLA_DEVICE Words4 latent(const Params& p, int64_t page, int slot, int i) {
        if constexpr (format == CacheFormat::kFp16) {
            const Part part = {Layout::kRows, 2, p.rank};
            return load<Words4>(find(p, 0, page, part, slot, 8 * i));
        } else if constexpr (format == CacheFormat::kInt8) {
            return bytes(p, 0, page, p.rank, kGroup, slot, i);
        } else {
            const Part part = {Layout::kBlocked, 1, p.rank / 2};
            const uint32_t word = load<uint32_t>(find(p, 0, page, part, slot, 4 * i));
            const int groups = p.rank / kGroup, group = 8 * i / kGroup;
            const float scale = number(p, 1, page, groups, slot, group);
            const float zero = number(p, 2, page, groups, slot, group);
            return pack_eight([&](int channel) {  // low nibbles are 0 to 3, high ones 4 to 7
                const uint32_t code = word >> (8 * (channel % 4) + channel / 4 * 4) & 15;
                return scale * static_cast<float>(code) + zero;
            });
        }
    }

    static MLA_DEVICE Words4 rope_key(const Params& p, int64_t page, int slot, int i) {
        if constexpr (format == CacheFormat::kFp16) {
            const Part part = {Layout::kRows, 2, p.rope};
            return load<Words4>(find(p, 1, page, part, slot, 8 * i));
        } else {
            return bytes(p, format == CacheFormat::kInt4 ? 3 : 2, page, p.rope, kRopeGroup, slot,
                         i);
        }
    }
};

// A product on the tensor cores: a block has kExpandTokens tokens and 64 columns of a head, each
// warp 32 of the tokens. Panels of the inner dimension are on their way ahead of their use.
struct Expand {
    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * kWarpLanes;
    static constexpr int kMinBlocks = 4;
    static constexpr int kColumns = 64;
    static constexpr int kStages = 4;
    static constexpr int kWarpTiles = kExpandTokens / kWarps / 16;  // of 16 tokens
    static constexpr int kColumnTiles = kColumns / 8;

    using Latents = Panels<kExpandTokens, kPanelColumns>;
    using KeyWeights = Panels<kColumns, kPanelColumns>;    // w_uk, by columns
    using ValueWeights = Panels<kPanelColumns, kColumns>;  // w_uv, by rows
    static constexpr int kStageBytes = Latents::kBytes + KeyWeights::kBytes;
    static_assert(KeyWeights::kBytes == ValueWeights::kBytes, "they take turns");
    static constexpr int kSharedBytes = kStages * kStageBytes;

    static MLA_CONSTEXPR int column_blocks(int width) { return (width + kColumns - 1) / kColumns; }

    // Grid: x column blocks of keys, then of values, y heads, z token blocks of a sequence, then
    // of the next.
    static MLA_DEVICE void run(const Params& p, const Thread& thread) {
        const int token_blocks = p.chunk_tokens / kExpandTokens;
        const int b = thread.block_z / token_blocks;
        const int first_token = thread.block_z % token_blocks * kExpandTokens;
        if (!is_seen(p, view_sequence(p, b), first_token)) return;
        const int key_blocks = column_blocks(p.nope), head = thread.block_y;
        const int64_t of_head = int64_t{b} * p.heads + head;
        const uint16_t* latents = p.c_kv + (int64_t{b} * p.chunk_tokens + first_token) * p.rank;
        if (thread.block_x < key_blocks)
            multiply<false>(latents, p.rank, p.w_uk + int64_t{head} * p.nope * p.rank, p.nope,
                            thread.block_x * kColumns,
                            p.keys + (of_head * p.chunk_tokens + first_token) * p.nope, thread);
        else
            multiply<true>(latents, p.rank, p.w_uv + int64_t{head} * p.rank * p.v, p.v,
                           (thread.block_x - key_blocks) * kColumns,
                           p.values + (of_head * p.chunk_tokens + first_token) * p.v, thread);
    }

    // out[token][column] for columns from `first` on, of `width`; w is [width, inner], or by rows
    // [inner, width].
    template <bool ByRows>
    static MLA_DEVICE void multiply(const uint16_t* latents, int inner, const uint16_t* w,
                                    int width, int first, uint16_t* out, const Thread& thread) {
        const auto copy = [&](int step) {
            if (step * kPanelColumns < inner) {
                uint8_t* stage = thread.shared + step % kStages * kStageBytes;
                const int k = step * kPanelColumns;
                Latents::template share<kThreads, kAll>(
                    thread.index, [&](uint32_t row, uint32_t chunk, uint32_t place) {
                        copy_async(stage + place, latents + int64_t{row} * inner + k + 8 * chunk,
                                   kChunk);
                    });
                uint8_t* weights = stage + Latents::kBytes;
                if constexpr (ByRows)
                    ValueWeights::template share<kThreads, kAll>(
                        thread.index, [&](uint32_t row, uint32_t chunk, uint32_t place) {
                            const int column = first + 8 * static_cast<int>(chunk);
                            const bool exists = column < width;
                            copy_async(weights + place,
                                       w + (int64_t{k} + row) * width + (exists ? column : 0),
                                       exists ? kChunk : 0);
                        });
                else
                    KeyWeights::template share<kThreads, kAll>(
                        thread.index, [&](uint32_t row, uint32_t chunk, uint32_t place) {
                            const int column = first + static_cast<int>(row);
                            const bool exists = column < width;
                            copy_async(weights + place,
                                       w + int64_t{exists ? column : 0} * inner + k + 8 * chunk,
                                       exists ? kChunk : 0);
                        });
            }
            commit_copies();  // an empty group at the end, so that counting stays simple
        };
        MLA_UNROLL
        for (int step = 0; step < kStages - 1; ++step) copy(step);
        const int lane = thread.lane(), group = lane / 4, quad = lane % 4;
        const int row = thread.warp() * kWarpTiles * 16;
        const uint32_t a_place = Latents::rows_place(row, lane);
        const uint32_t b_place =
            ByRows ? ValueWeights::columns_by_rows_place(lane) : KeyWeights::columns_place(lane);
        float sums[kWarpTiles][kColumnTiles][4] = {};
        MLA_NO_UNROLL
        for (int step = 0; step * kPanelColumns < inner; ++step) {
            wait_copies(kStages - 2);
            barrier();  // this step's panels are there, and those of the step before are done with
            copy(step + kStages - 1);
            const uint8_t* stage = thread.shared + step % kStages * kStageBytes;
            const uint8_t* weights = stage + Latents::kBytes;
            MLA_UNROLL
            for (int k = 0; k < kPanelColumns / 16; ++k) {
                uint32_t a[kWarpTiles][4];
                MLA_UNROLL
                for (int t = 0; t < kWarpTiles; ++t)
                    load_matrices(a[t], stage + Latents::moved(a_place, 16 * t, 2 * k));
                MLA_UNROLL
                for (int j = 0; j < kColumnTiles; j += 2) {
                    uint32_t w2[4];
                    if constexpr (ByRows)
                        load_matrices_transposed(w2,
                                                 weights + ValueWeights::moved(b_place, 16 * k, j));
                    else
                        load_matrices(w2, weights + KeyWeights::moved(b_place, 8 * j, 2 * k));
                    MLA_UNROLL
                    for (int t = 0; t < kWarpTiles; ++t) {
                        mma(sums[t][j], a[t], w2[0], w2[1]);
                        mma(sums[t][j + 1], a[t], w2[2], w2[3]);
                    }
                }
            }
        }
        MLA_UNROLL
        for (int t = 0; t < kWarpTiles; ++t) {
            uint16_t* above = out + int64_t{row + 16 * t + group} * width + first + 2 * quad;
            MLA_UNROLL
            for (int j = 0; j < kColumnTiles; ++j) {
                if (first + 8 * j >= width) break;
                const float (&x)[4] = sums[t][j];
                store<uint32_t>(above + 8 * j, pack_half2(in_range(x[0]), in_range(x[1])));
                store<uint32_t>(above + 8 * width + 8 * j,
                                pack_half2(in_range(x[2]), in_range(x[3])));
            }
        }
    }
};

}  // namespace mla::cuda
