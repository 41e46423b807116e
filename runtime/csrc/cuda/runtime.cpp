#include "cuda/launch.h"

#ifdef MLA_CUDA_EMULATION

#include <cstdlib>
#include <cstring>

namespace mla::cuda {

const char* failure_text(Failure) { return "the emulation does not fail"; }

// The least that a supported device has, and short rounds, so that tests come to every limit.
Failure current_device(Device* device) {
    *device = {4, 99 << 10, 100 << 10, 86, 96, 64 << 10};
    return 0;
}

Failure allocate_on_device(void** memory, size_t bytes) {
    *memory = std::calloc(bytes, 1);
    return 0;
}

Failure release_on_device(void* memory) {
    std::free(memory);
    return 0;
}

Failure clear_on_device(void* memory, size_t bytes, Stream) {
    std::memset(memory, 0, bytes);
    return 0;
}

Failure copy_on_device(void* to, const void* from, size_t bytes, Stream) {
    std::memcpy(to, from, bytes);
    return 0;
}

Failure copy_to_host(void* host, const void* from, size_t bytes) {
    std::memcpy(host, from, bytes);
    return 0;
}

Failure copy_to_device(void* to, const void* host, size_t bytes) {
    std::memcpy(to, host, bytes);
    return 0;
}

Failure wait_for(Stream) { return 0; }

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
    device->chunk_bytes = kMaxChunkBytes;
    return 0;
}

Failure allow_shared_memory(const void* kernel) {
    int index = 0, bytes = 0;
    cudaError_t error = cudaGetDevice(&index);
    if (error == cudaSuccess)
        error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    if (error == cudaSuccess)
        error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    return error;
}

Failure allocate_on_device(void** memory, size_t bytes) {
    cudaError_t error = cudaMalloc(memory, bytes);
    if (error == cudaErrorMemoryAllocation) {
        *memory = nullptr;
        cudaGetLastError();  // it is told by the null, and no later call is to find it
        return 0;
    }
    if (error == cudaSuccess) {
        error = cudaMemset(*memory, 0, bytes);
        if (error == cudaSuccess) error = cudaDeviceSynchronize();
        if (error != cudaSuccess) cudaFree(*memory);
    }
    return error;
}

Failure release_on_device(void* memory) { return cudaFree(memory); }

Failure clear_on_device(void* memory, size_t bytes, Stream stream) {
    return cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream));
}

Failure copy_on_device(void* to, const void* from, size_t bytes, Stream stream) {
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice,
                           static_cast<cudaStream_t>(stream));
}

Failure copy_to_host(void* host, const void* from, size_t bytes) {
    return cudaMemcpy(host, from, bytes, cudaMemcpyDeviceToHost);
}

Failure copy_to_device(void* to, const void* host, size_t bytes) {
    const cudaError_t error = cudaMemcpy(to, host, bytes, cudaMemcpyHostToDevice);
    // A small copy may still be on its way when the call returns.
    return error == cudaSuccess ? cudaStreamSynchronize(nullptr) : error;
}

Failure wait_for(Stream stream) { return cudaStreamSynchronize(static_cast<cudaStream_t>(stream)); }

}  // namespace mla::cuda

#endif
