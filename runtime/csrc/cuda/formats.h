// From a tile's bytes to operands of the tensor cores, a record each.
//
// Both products of attention read the same tile. Scores want, of a token, pairs of channels side by
// side (keys()); values want, of a channel, pairs of tokens (values()). Which channel an index of
// the matrix product stands for is free, so that each is chosen where the bytes already are:
//
//   scores   index k of 16-channel step `step` of a group: key_channel(); queries follow it
//   values   column n of the group's 8-column tile j: value_channel(); outputs follow it
//            indices k of 16 tokens: a lane's four are neighbours; probabilities follow them
//
// A lane's place in a fragment is device.h's: group = lane / 4 is the column, quad = lane % 4 gives
// the rows. A record is one of two kinds:
//
//   decoded  operands are latents in half, rounded once
//   folded   operands are codes. A code in the lowest bits of a half is that number times 2^-24, a
//            subnormal, which the tensor cores take as it is: so nibbles become operands by a mask,
//            and scales and zeros are left to the few sums of a group (attend.h).
#pragma once

#include "cuda/tile.h"

namespace mla::cuda {

constexpr int kGroupSteps = kGroup / 16;  // steps of scores a group
constexpr int kGroupTiles = kGroup / 8;   // column tiles of values a group

// 1024 + x has x in its lowest bits, for whole numbers x below 1024.
constexpr uint32_t k1024 = 0x64006400;
constexpr uint32_t k1152 = 0x64806480;

MLA_DEVICE uint32_t twice(uint32_t half) { return permute(half, half, 0x1010); }

// Signed bytes `pair` (0: the lower two, 1: the upper two) of a word that was xored with
// 0x80808080.
MLA_DEVICE uint32_t biased_bytes_to_half2(uint32_t word, int pair) {
    return half2_sub(permute(word, k1024, pair ? 0x7372 : 0x7170), k1152);
}

// The rope key in int8, whatever the latent is in; four lines of 16 channels a step, a scale each.
struct RopeCodes {
    // Operands b0, b1 of step `step` for token `slot` of block `block`.
    template <int Tokens>
    static MLA_DEVICE void keys(const uint8_t* codes, const uint8_t* scales, int rope, int step,
                                int block, int slot, int quad, uint32_t (&b)[2]) {
        using At = TilePart<Tokens>;
        const uint32_t word =
            load<uint32_t>(codes + At::blocked(rope / 4, block, 4 * step, quad, slot)) ^
            0x80808080u;
        const uint32_t scale =
            twice(load<uint16_t>(scales + At::column(step, kBlockTokens * block + slot)));
        b[0] = half2_mul(biased_bytes_to_half2(word, 0), scale);
        b[1] = half2_mul(biased_bytes_to_half2(word, 1), scale);
    }
};

// Four channels of a word side by side: int8 and fp16, and the rope key of every record.
struct QuadChannels {
    static constexpr bool kFolded = false;
    static MLA_CONSTEXPR float key_factor(int) { return 1; }
    static constexpr bool kAlternate = false;  // b0 is channels 0, 1 of the four, b1 is 2, 3
    static MLA_CONSTEXPR int key_channels(int step, int quad) { return 16 * step + 4 * quad; }
    static MLA_CONSTEXPR int value_channel(int tile, int column) {
        return tile / 4 * 32 + 4 * column + tile % 4;
    }
};

struct Int4Format {
    static constexpr int kTile = 64;
    static constexpr int kParts = 5;

    static MLA_CONSTEXPR Part part(int index, int rank, int rope) {
        return index == 0   ? Part{Layout::kBlocked, 1, rank / 2}
               : index <= 2 ? Part{Layout::kColumns, 2, rank / kGroup}
               : index == 3 ? Part{Layout::kBlocked, 1, rope}
                            : Part{Layout::kColumns, 2, rope / kRopeGroup};
    }

    // A word holds channels 0 to 3 of its eight in the low, 4 to 7 in the high nibbles; each half
    // of it is two steps of 4 lines. Of four channels, b0 is 0 and 2, b1 is 1 and 3.
    static constexpr bool kAlternate = true;
    static MLA_CONSTEXPR int key_channels(int step, int quad) {
        return 8 * (4 * (step / 2) + quad) + 4 * (step % 2);
    }
    static MLA_CONSTEXPR int value_channel(int tile, int column) { return 8 * column + tile; }

    // Both halves' code at a nibble, times 2^-24 in the low ones and 2^-20 in the high ones.
    static MLA_DEVICE uint32_t low(uint32_t word) { return word & 0x000f000fu; }
    static MLA_DEVICE uint32_t high(uint32_t word) { return word & 0x00f000f0u; }

    // What queries of a step are multiplied by, and sums of a tile of values: high nibbles
    // weigh 16.
    static constexpr bool kFolded = true;
    static constexpr float kUnit = 16777216;  // 2^24
    static MLA_CONSTEXPR float key_factor(int step) { return step % 2 ? 1.0f / 16 : 1.0f; }
    static MLA_CONSTEXPR float value_factor(int tile) { return tile < 4 ? kUnit : kUnit / 16; }

    // Scales of tokens `token` (even) and `token` + 1, in half.
    static MLA_DEVICE uint32_t scales(const uint8_t* const (&at)[kMaxParts], int group, int token) {
        return load<uint32_t>(at[1] + TilePart<kTile>::column(group, token));
    }
    // Of tokens `token` (a multiple of four) to `token` + 3.
    static MLA_DEVICE Words2 four_scales(const uint8_t* const (&at)[kMaxParts], int group,
                                         int token) {
        return load<Words2>(at[1] + TilePart<kTile>::column(group, token));
    }
    static MLA_DEVICE Words2 four_zeros(const uint8_t* const (&at)[kMaxParts], int group,
                                        int token) {
        return load<Words2>(at[2] + TilePart<kTile>::column(group, token));
    }
    // Zeros of one token in groups 2 quad and 2 quad + 1, as far as there are groups.
    template <int Groups>
    static MLA_DEVICE uint32_t zeros_of(const uint8_t* const (&at)[kMaxParts], int token,
                                        int quad) {
        if (2 * quad >= Groups) return 0;
        return permute(load<uint16_t>(at[2] + TilePart<kTile>::column(2 * quad, token)),
                       load<uint16_t>(at[2] + TilePart<kTile>::column(2 * quad + 1, token)),
                       0x5410);
    }

    template <int Rank>
    static MLA_DEVICE void keys(const uint8_t* const (&at)[kMaxParts], int group, int block,
                                int slot, int quad, uint32_t (&b)[kGroupSteps][2]) {
        using At = TilePart<kTile>;
        MLA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const uint32_t word = load<uint32_t>(
                at[0] + At::blocked(Rank / 8, block, 8 * group + 4 * half, quad, slot));
            b[2 * half][0] = low(word);
            b[2 * half][1] = low(word >> 8);
            b[2 * half + 1][0] = high(word);
            b[2 * half + 1][1] = high(word >> 8);
        }
    }

    static MLA_DEVICE void rope_keys(const uint8_t* const (&at)[kMaxParts], int rope, int step,
                                     int block, int slot, int quad, uint32_t (&b)[2]) {
        RopeCodes::keys<kTile>(at[3], at[4], rope, step, block, slot, quad, b);
    }

    // Column `column` of all tiles is line 8 group + column: a word a token has the eight of them.
    template <int Rank>
    static MLA_DEVICE void values(const uint8_t* const (&at)[kMaxParts], int group, int step,
                                  int column, int quad, uint32_t (&b)[kGroupTiles][2]) {
        using At = TilePart<kTile>;
        const Words4 words =
            load<Words4>(at[0] + At::blocked(Rank / 8, step, 8 * group, column, 4 * quad));
        MLA_UNROLL
        for (int i = 0; i < 2; ++i) {
            const uint32_t one = i ? words.z : words.x, other = i ? words.w : words.y;
            MLA_UNROLL
            for (int half = 0; half < 2; ++half) {
                const uint32_t pair = permute(one, other, half ? 0x7632 : 0x5410);
                b[2 * half][i] = low(pair);
                b[2 * half + 1][i] = low(pair >> 8);
                b[2 * half + 4][i] = high(pair);
                b[2 * half + 5][i] = high(pair >> 8);
            }
        }
    }
};

struct Int8Format : QuadChannels {
    static constexpr int kTile = 32;
    static constexpr int kParts = 4;

    static MLA_CONSTEXPR Part part(int index, int rank, int rope) {
        return index == 0   ? Part{Layout::kBlocked, 1, rank}
               : index == 1 ? Part{Layout::kColumns, 2, rank / kGroup}
               : index == 2 ? Part{Layout::kBlocked, 1, rope}
                            : Part{Layout::kColumns, 2, rope / kRopeGroup};
    }

    template <int Rank>
    static MLA_DEVICE void keys(const uint8_t* const (&at)[kMaxParts], int group, int block,
                                int slot, int quad, uint32_t (&b)[kGroupSteps][2]) {
        using At = TilePart<kTile>;
        const uint32_t scale =
            twice(load<uint16_t>(at[1] + At::column(group, kBlockTokens * block + slot)));
        MLA_UNROLL
        for (int step = 0; step < kGroupSteps; ++step) {
            const uint32_t word =
                load<uint32_t>(at[0] +
                               At::blocked(Rank / 4, block, 16 * group + 4 * step, quad, slot)) ^
                0x80808080u;
            b[step][0] = half2_mul(biased_bytes_to_half2(word, 0), scale);
            b[step][1] = half2_mul(biased_bytes_to_half2(word, 1), scale);
        }
    }

    static MLA_DEVICE void rope_keys(const uint8_t* const (&at)[kMaxParts], int rope, int step,
                                     int block, int slot, int quad, uint32_t (&b)[2]) {
        RopeCodes::keys<kTile>(at[2], at[3], rope, step, block, slot, quad, b);
    }

    // Column `column` of tiles 0 to 3 is line 16 group + column, of 4 to 7 that 8 lines on.
    template <int Rank>
    static MLA_DEVICE void values(const uint8_t* const (&at)[kMaxParts], int group, int step,
                                  int column, int quad, uint32_t (&b)[kGroupTiles][2]) {
        using At = TilePart<kTile>;
        const Words2 scales = load<Words2>(at[1] + At::column(group, 16 * step + 4 * quad));
        MLA_UNROLL
        for (int half = 0; half < 2; ++half) {
            const Words4 words = load<Words4>(
                at[0] + At::blocked(Rank / 4, step, 16 * group + 8 * half, column, 4 * quad));
            MLA_UNROLL
            for (int i = 0; i < 2; ++i) {
                const uint32_t one = (i ? words.z : words.x) ^ 0x80808080u;
                const uint32_t other = (i ? words.w : words.y) ^ 0x80808080u;
                const uint32_t scale = i ? scales.y : scales.x;
                MLA_UNROLL
                for (int upper = 0; upper < 2; ++upper) {
                    const uint32_t pairs = permute(one, other, upper ? 0x7362 : 0x5140);
                    b[4 * half + 2 * upper][i] = half2_mul(biased_bytes_to_half2(pairs, 0), scale);
                    b[4 * half + 2 * upper + 1][i] =
                        half2_mul(biased_bytes_to_half2(pairs, 1), scale);
                }
            }
        }
    }
};

struct Fp16Format : QuadChannels {
    static constexpr int kTile = 32;
    static constexpr int kParts = 2;

    static MLA_CONSTEXPR Part part(int index, int rank, int rope) {
        return index == 0 ? Part{Layout::kRows, 2, rank} : Part{Layout::kRows, 2, rope};
    }

    template <int Rank>
    static MLA_DEVICE void keys(const uint8_t* const (&at)[kMaxParts], int group, int block,
                                int slot, int quad, uint32_t (&b)[kGroupSteps][2]) {
        using At = TilePart<kTile>;
        MLA_UNROLL
        for (int step = 0; step < kGroupSteps; ++step) {
            const Words2 words =
                load<Words2>(at[0] + At::row(Rank, kBlockTokens * block + slot,
                                             kGroup * group + 16 * step + 4 * quad));
            b[step][0] = words.x;
            b[step][1] = words.y;
        }
    }

    static MLA_DEVICE void rope_keys(const uint8_t* const (&at)[kMaxParts], int rope, int step,
                                     int block, int slot, int quad, uint32_t (&b)[2]) {
        const Words2 words = load<Words2>(
            at[1] + TilePart<kTile>::row(rope, kBlockTokens * block + slot, 16 * step + 4 * quad));
        b[0] = words.x;
        b[1] = words.y;
    }

    template <int Rank>
    static MLA_DEVICE void values(const uint8_t* const (&at)[kMaxParts], int group, int step,
                                  int column, int quad, uint32_t (&b)[kGroupTiles][2]) {
        using At = TilePart<kTile>;
        MLA_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int token = 16 * step + 4 * quad + 2 * i;
            MLA_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int channel = kGroup * group + 32 * half + 4 * column;
                const Words2 one = load<Words2>(at[0] + At::row(Rank, token, channel));
                const Words2 other = load<Words2>(at[0] + At::row(Rank, token + 1, channel));
                b[4 * half][i] = permute(one.x, other.x, 0x5410);
                b[4 * half + 1][i] = permute(one.x, other.x, 0x7632);
                b[4 * half + 2][i] = permute(one.y, other.y, 0x5410);
                b[4 * half + 3][i] = permute(one.y, other.y, 0x7632);
            }
        }
    }
};

}  // namespace mla::cuda
