// How queries and partial sums lie in the workspace: as the tensor cores hold them, so that a warp
// reads and writes 512 neighbouring bytes at once.
//
// Rows come in tiles of 16. A lane (group, quad) of a fragment has rows `group` and `group` + 8.
#pragma once

#include "cuda/formats.h"

namespace mla::cuda {

constexpr int kRowTile = 16;
constexpr int kStepChannels = 16;
constexpr int kFragmentWords = kWarpLanes * 4;

// ---- queries: an operand a step of 16 channels; after the latent's, those of the rope key -------

// Words of step `step`, lane after lane, of row tile `tile` of sequence `b`.
MLA_DEVICE uint32_t* query_fragment(const Params& p, int b, int64_t tile, int step) {
    return p.queries +
           ((static_cast<int64_t>(b) * p.row_tiles + tile) * ((p.rank + p.rope) / kStepChannels) +
            step) *
               kFragmentWords;
}

// Writes the four neighbouring channels that lane (row % 8, quad) has of a step.
template <class Format>
MLA_DEVICE void put_query(uint32_t* fragment, int row, int quad, float factor, const Floats4& x) {
    const float second = Format::kAlternate ? x.z : x.y, third = Format::kAlternate ? x.y : x.z;
    uint32_t* words = fragment + (row % 8 * 4 + quad) * 4 + row / 8;
    words[0] = pack_half2(in_range(x.x) * factor, in_range(second) * factor);
    words[2] = pack_half2(in_range(third) * factor, in_range(x.w) * factor);
}

// ---- partial sums: a lane's 64 channels of two rows, in pieces of four channels
// ------------------

constexpr int kPieces = 2 * kGroup / 4 / 4;  // a lane's of a group

// Row and channel of piece `piece` of lane `lane` in the group of warp `warp`.
struct Piece {
    int row, channel;
};
MLA_DEVICE Piece piece_of(bool folded, int warp, int piece, int lane) {
    const int tile = piece % 2 * 4, column = 2 * (lane % 4) + piece / 2 % 2;
    return {piece / 4 * 8 + lane / 4,
            warp * kGroup + (folded ? Int4Format::value_channel(tile, column)
                                    : QuadChannels::value_channel(tile, column))};
}

// Where the sums of a run of tiles begin.
MLA_DEVICE float* partial_sums(const Params& p, int b, int64_t tile, int split) {
    return p.partial_o +
           ((static_cast<int64_t>(b) * p.row_tiles + tile) * p.splits + split) * kRowTile * p.rank;
}

}  // namespace mla::cuda
