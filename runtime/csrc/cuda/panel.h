// A matrix of halves in shared memory, as load_matrices() wants it: panels of 32 columns, in which
// chunk c (8 halves) of row r lies at c ^ (r / 2 % 4). So eight rows of one chunk, and four chunks
// of two rows, are in 32 different banks.
#pragma once

#include "cuda/tile.h"

namespace mla::cuda {

constexpr int kAll = 64;  // of share()'s Unroll: more than there are
constexpr int kPanelChunks = 4;
constexpr int kPanelColumns = kPanelChunks * kChunk / 2;

template <int Rows, int Columns>
struct Panels {
    static_assert(Columns % kPanelColumns == 0 && Rows % 8 == 0, "whole panels");
    static constexpr int kChunks = Columns * 2 / kChunk;  // a row
    static constexpr int kBytes = Rows * Columns * 2;

    static MLA_DEVICE uint32_t at(uint32_t row, uint32_t chunk) {
        return ((chunk / kPanelChunks * Rows + row) * kPanelChunks +
                (chunk % kPanelChunks ^ (row / 2 % kPanelChunks))) *
               kChunk;
    }

    // Calls body(row, chunk, place) for this thread's share of the chunks, `Unroll` at once. A
    // thread's rows and panels are constants apart, and so are its places.
    template <int Threads, int Unroll, class Body>
    static MLA_DEVICE void share(int thread, const Body& body) {
        constexpr int kRowsAtOnce = Threads / kPanelChunks, kPanels = kChunks / kPanelChunks;
        static_assert(Rows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0, "equal shares");
        const uint32_t first_row = thread / kPanelChunks, first_chunk = thread % kPanelChunks;
        const uint32_t place = at(first_row, first_chunk);
        MLA_UNROLL_BY(Unroll)
        for (int i = 0; i < Rows / kRowsAtOnce * kPanels; ++i) {
            const uint32_t row = i / kPanels * kRowsAtOnce, panel = i % kPanels;
            body(first_row + row, panel * kPanelChunks + first_chunk,
                 place + (panel * Rows + row) * kPanelChunks * kChunk);
        }
    }

    // Where a lane reads its share of four 8 x 8 matrices: the first of its places, of operand a of
    // rows `row` to `row` + 15; of operands b0, b1 of two tiles of columns, of a matrix that is
    // stored by columns; and of the same where it is stored by rows.
    static MLA_DEVICE uint32_t rows_place(int row, int lane) {
        return at(row + lane % 16, lane / 16);
    }
    static MLA_DEVICE uint32_t columns_place(int lane) {
        return at(lane / 16 * 8 + lane % 8, lane / 8 % 2);
    }
    static MLA_DEVICE uint32_t columns_by_rows_place(int lane) { return at(lane % 16, lane / 16); }

    // `rows` rows (a multiple of 8) and `chunks` chunks (an even number) on from the first place.
    // Permuted or not, that is a constant away, but for one bit.
    static MLA_DEVICE uint32_t moved(uint32_t place, uint32_t rows, uint32_t chunks) {
        return (place ^ chunks % kPanelChunks * kChunk) +
               (chunks / kPanelChunks * Rows + rows) * kPanelChunks * kChunk;
    }
};

}  // namespace mla::cuda
