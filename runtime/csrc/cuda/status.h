// What the C calls of this library have in common: statuses, and the text of the last error.
#pragma once

#include "cuda/launch.h"
#include "mla_deploy/cuda.h"

namespace mla::cuda {

// Keeps the text for mla_cuda_last_error; gives the status.
mla_cuda_status fail(mla_cuda_status status, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

// `failure` came from a call of the CUDA runtime.
mla_cuda_status fail_launch(Failure failure);

}  // namespace mla::cuda

#define MLA_EXPECT(condition, ...) \
    if (!(condition)) return fail(MLA_CUDA_BAD_ARGUMENT, __VA_ARGS__)

#define MLA_TRY(call) \
    if (const mla_cuda_status status = (call); status != MLA_CUDA_OK) return status

#define MLA_LAUNCH(call) \
    if (const Failure failure = (call)) return fail_launch(failure)
