// Launches Attend for the sizes that it is built for. A record is a file of its own
// (attend_*.cu), because these kernels take long to compile.
#pragma once

#include "cuda/launch.h"
#include "cuda/params.h"
#include "cuda/record.h"

namespace mla::cuda {

constexpr int kMinStages = 2;
constexpr int kMaxStages = 4;

// How a call's rows are cut: 16 or 32 rows a block.
inline int row_tiles_for(int64_t rows) { return rows <= 16 ? 1 : 2; }

// What the choice of splits and stages needs to know of a kernel.
struct AttendShape {
    int blocks_wanted;  // on a multiprocessor
    int rows;           // a block
    int tile_tokens;
    int fixed_bytes, tile_bytes;  // of shared memory
};

using DescribeAttend = AttendShape (*)(int rank, int rope, int row_tiles);
using LaunchAttend = Failure (*)(const Params& params, int row_tiles, Grid grid, int shared_bytes,
                                 Stream stream);

struct AttendFamily {
    DescribeAttend describe;
    LaunchAttend launch;
    int parts;  // of the record
    Part (*part)(int index, int rank, int rope);
};

extern const AttendFamily kAttendInt4;
extern const AttendFamily kAttendInt8;
extern const AttendFamily kAttendFp16;

inline const AttendFamily& family_of(CacheFormat format) {
    return format == CacheFormat::kInt4   ? kAttendInt4
           : format == CacheFormat::kInt8 ? kAttendInt8
                                          : kAttendFp16;
}

}  // namespace mla::cuda
