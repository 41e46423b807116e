// The host's side of a launch: the only place that knows the CUDA runtime, or its emulation.
#pragma once

#include <cstddef>

#include "cuda/device.h"
#include "cuda/params.h"

namespace mla::cuda {

// 0: success; else an error of the CUDA runtime, whose text is failure_text().
using Failure = int;
using Stream = void*;  // cudaStream_t

const char* failure_text(Failure failure);

// A device's limits on a plan: no device goes beyond, so that a workspace can be had in advance.
constexpr int kMaxMultiprocessors = 256;
constexpr int64_t kMaxRoundRows = 16384;
constexpr int64_t kMaxChunkBytes = 64 << 20;

struct Device {
    int multiprocessors;     // that are put to use
    int shared_bytes;        // that a block can have
    int shared_bytes_all;    // of a multiprocessor
    int compute_capability;  // 90 for 9.0
    int64_t round_rows;      // of all sequences: long calls run in rounds, or memory would grow
    int64_t chunk_bytes;     // of keys and values at a time, and of what waits for the next ones
};
// The current device.
Failure current_device(Device* device);

// Zeroed memory, in *memory; null: the device has not as much left.
Failure allocate_on_device(void** memory, size_t bytes);
Failure release_on_device(void* memory);
Failure clear_on_device(void* memory, size_t bytes, Stream stream);
Failure copy_on_device(void* to, const void* from, size_t bytes, Stream stream);
Failure copy_to_host(void* host, const void* from, size_t bytes);
Failure copy_to_device(void* to, const void* host, size_t bytes);
Failure wait_for(Stream stream);

struct Grid {
    int64_t x, y, z;
};

#ifdef __CUDACC__

// Lets blocks of a kernel have all shared memory of the current device. Not just what a launch
// takes: another thread may be about to launch the same kernel with more.
Failure allow_shared_memory(const void* kernel);

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kMinBlocks)
    entry(const __grid_constant__ Params params) {
    extern __shared__ __align__(128) uint8_t shared[];
    const Thread thread = {static_cast<int>(threadIdx.x), static_cast<int>(blockIdx.x),
                           static_cast<int>(blockIdx.y), static_cast<int>(blockIdx.z), shared};
    Kernel::run(params, thread);
}

template <class Kernel>
Failure launch(const Params& params, Grid grid, int shared_bytes, Stream stream) {
    if (shared_bytes > 48 << 10) {
        const auto kernel = reinterpret_cast<const void*>(entry<Kernel>);
        if (const Failure failure = allow_shared_memory(kernel)) return failure;
    }
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                          static_cast<unsigned>(grid.z));
    config.blockDim = dim3(Kernel::kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = params.overlaps;
    return cudaLaunchKernelEx(&config, entry<Kernel>, params);
}

// Whether the current device can run what this library holds.
template <class Kernel>
Failure probe() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, entry<Kernel>);
}

#else

template <class Kernel>
Failure launch(const Params& params, Grid grid, int shared_bytes, Stream) {
    emulation::run_grid(
        static_cast<int>(grid.x), static_cast<int>(grid.y), static_cast<int>(grid.z),
        Kernel::kThreads, static_cast<size_t>(shared_bytes),
        [](const void* context, const Thread& thread) {
            Kernel::run(*static_cast<const Params*>(context), thread);
        },
        &params);
    return 0;
}

template <class Kernel>
Failure probe() {
    return 0;
}

#endif

}  // namespace mla::cuda
