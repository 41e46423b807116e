// The kernels of one record: what each attend_*.cu defines.
#pragma once

#include "cuda/attend.h"
#include "cuda/attend_launch.h"

namespace mla::cuda {

template <class Format>
struct Family {
    // Calls use(kernel) with the kernel of these sizes.
    template <class Use>
    static auto choose(int rank, int rope, int row_tiles, const Use& use) {
        if (rope == 64) return choose_rank<64>(rank, row_tiles, use);
        return choose_rank<0>(rank, row_tiles, use);
    }
    template <int Rope, class Use>
    static auto choose_rank(int rank, int row_tiles, const Use& use) {
        if (rank == 512) return choose_tiles<Rope, 512>(row_tiles, use);
        return choose_tiles<Rope, 256>(row_tiles, use);
    }
    template <int Rope, int Rank, class Use>
    static auto choose_tiles(int row_tiles, const Use& use) {
        return row_tiles == 1 ? use(Attend<Format, Rank, 1, Rope>())
                              : use(Attend<Format, Rank, 2, Rope>());
    }

    static AttendShape describe(int rank, int rope, int row_tiles) {
        return choose(rank, rope, row_tiles, [&](auto kernel) {
            using Kernel = decltype(kernel);
            return AttendShape{Kernel::kMinBlocks, Kernel::kRows, Kernel::kTile,
                               Kernel::kFixedBytes, Kernel::tile_bytes(rope)};
        });
    }

    static Failure launch(const Params& params, int row_tiles, Grid grid, int shared_bytes,
                          Stream stream) {
        return choose(params.rank, params.rope, row_tiles, [&](auto kernel) {
            return cuda::launch<decltype(kernel)>(params, grid, shared_bytes, stream);
        });
    }

    static Part part(int index, int rank, int rope) { return Format::part(index, rank, rope); }
};

template <class Format>
constexpr AttendFamily family() {
    using F = Family<Format>;
    return {F::describe, F::launch, Format::kParts, F::part};
}

}  // namespace mla::cuda
