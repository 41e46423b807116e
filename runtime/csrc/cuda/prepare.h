// What comes before attention and needs none of it: new tokens go into the cache, and queries to
// the workspace. One launch for both, as they do not need each other either.
#pragma once

#include "cuda/append.h"
#include "cuda/head_matmul.h"

namespace mla::cuda {

template <CacheFormat format, int Tiles>
struct Prepare {
    using Matmul = HeadMatmul<Tiles>;

    static constexpr int kThreads = Matmul::kThreads;
    static constexpr int kMinBlocks = Matmul::kMinBlocks;
    static constexpr int kSharedBytes = Matmul::kSharedBytes;
    static constexpr int kWarps = Matmul::kWarps;

    static MLA_CONSTEXPR int64_t append_blocks(const Params& p) {
        return (Append<format>::warps(p) + kWarps - 1) / kWarps;
    }

    // Grid: x blocks of Append, then those of Queries.
    static MLA_DEVICE void run(const Params& p, const Thread& thread) {
        begin_overlapped();
        const int64_t block = thread.block_x - append_blocks(p);
        if (block >= 0) {
            Matmul::Queries::run(p, block, thread);
        } else {
            Append<format>::run(p, int64_t{thread.block_x} * kWarps + thread.warp(), thread.lane());
        }
    }
};

}  // namespace mla::cuda
