#include "cuda/status.h"

#include <cstdarg>
#include <cstdio>

#ifndef MLA_CUDA_TARGETS
#define MLA_CUDA_TARGETS "emulation"
#endif

namespace mla::cuda {

namespace {

constexpr int kMinComputeCapability = 80;

thread_local char error_text[512] = "no call has failed in this thread";

}  // namespace

mla_cuda_status fail(mla_cuda_status status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return status;
}

mla_cuda_status fail_launch(Failure failure) {
    Device device = {};
    if (current_device(&device) != 0)
        return fail(MLA_CUDA_UNSUPPORTED,
                    "no NVIDIA GPU can be used here: %s. This library needs a driver for the CUDA "
                    "release that it was built with, and a device of %s or later: install one, or "
                    "use the CPU",
                    failure_text(failure), MLA_CUDA_TARGETS);
    const int capability = device.compute_capability;
    if (capability < kMinComputeCapability)
        return fail(MLA_CUDA_UNSUPPORTED,
                    "the device has compute capability %d.%d; this library was built for %s: use "
                    "another device, or the CPU",
                    capability / 10, capability % 10, MLA_CUDA_TARGETS);
    return fail(MLA_CUDA_FAILED,
                "the CUDA runtime says: %s. The device has compute capability %d.%d; this library "
                "was built for %s: if none of these serves it, build with MLA_CUDA_TARGETS=%d",
                failure_text(failure), capability / 10, capability % 10, MLA_CUDA_TARGETS,
                capability);
}

}  // namespace mla::cuda

extern "C" {

const char* mla_cuda_last_error(void) { return mla::cuda::error_text; }

const char* mla_cuda_targets(void) { return MLA_CUDA_TARGETS; }

}  // extern "C"
