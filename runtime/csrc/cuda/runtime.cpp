#include "cuda/launch.h"

#ifdef MLA_CUDA_EMULATION

#include <cstring>

namespace mla::cuda {

const char* failure_text(Failure) { return "the emulation does not fail"; }

// The least that a supported device has, and short rounds, so that tests come to every limit.
Failure current_device(Device* device) {
    *device = {4, 99 << 10, 100 << 10, 86, 96};
    return 0;
}

Failure copy_on_device(void* to, const void* from, size_t bytes, Stream) {
    std::memcpy(to, from, bytes);
    return 0;
}

}  // namespace mla::cuda

#else

#include <cuda_runtime_api.h>

namespace mla::cuda {

const char* failure_text(Failure failure) {
    return cudaGetErrorString(static_cast<cudaError_t>(failure));
}

Failure current_device(Device* device) {
    int index = 0;
    if (const cudaError_t error = cudaGetDevice(&index); error != cudaSuccess) return error;
    int major = 0, minor = 0;
    const struct {
        cudaDeviceAttr attribute;
        int* value;
    } wanted[] = {
        {cudaDevAttrMultiProcessorCount, &device->multiprocessors},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &device->shared_bytes_all},
        {cudaDevAttrComputeCapabilityMajor, &major},
        {cudaDevAttrComputeCapabilityMinor, &minor},
    };
    for (const auto& [attribute, value] : wanted) {
        const cudaError_t error = cudaDeviceGetAttribute(value, attribute, index);
        if (error != cudaSuccess) return error;
    }
    if (device->multiprocessors > kMaxMultiprocessors)
        device->multiprocessors = kMaxMultiprocessors;
    device->compute_capability = 10 * major + minor;
    device->round_rows = kMaxRoundRows;
    return 0;
}

Failure copy_on_device(void* to, const void* from, size_t bytes, Stream stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                           static_cast<cudaStream_t>(stream));
}

}  // namespace mla::cuda

#endif
