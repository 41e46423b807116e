// The C calls on memory of the device.
#include "cuda/status.h"

using namespace mla::cuda;

extern "C" {

mla_cuda_status mla_cuda_allocate(void** memory, size_t bytes) {
    MLA_EXPECT(memory && bytes > 0, "mla_cuda_allocate: a null pointer, or no bytes");
    *memory = nullptr;
    void* made = nullptr;
    MLA_LAUNCH(allocate_on_device(&made, bytes));
    if (made == nullptr)
        return fail(MLA_CUDA_NO_MEMORY,
                    "the device has no %zu bytes left in one piece: ask for less, or end what else "
                    "uses the device",
                    bytes);
    *memory = made;
    return MLA_CUDA_OK;
}

mla_cuda_status mla_cuda_release(void* memory) {
    MLA_LAUNCH(release_on_device(memory));
    return MLA_CUDA_OK;
}

mla_cuda_status mla_cuda_clear(void* memory, size_t bytes, void* stream) {
    MLA_EXPECT(memory || bytes == 0, "mla_cuda_clear: a null pointer");
    MLA_LAUNCH(clear_on_device(memory, bytes, stream));
    return MLA_CUDA_OK;
}

mla_cuda_status mla_cuda_copy(void* to, const void* from, size_t bytes, void* stream) {
    MLA_EXPECT((to && from) || bytes == 0, "mla_cuda_copy: a null pointer");
    MLA_LAUNCH(copy_on_device(to, from, bytes, stream));
    return MLA_CUDA_OK;
}

mla_cuda_status mla_cuda_read(void* host, const void* from, size_t bytes) {
    MLA_EXPECT((host && from) || bytes == 0, "mla_cuda_read: a null pointer");
    MLA_LAUNCH(copy_to_host(host, from, bytes));
    return MLA_CUDA_OK;
}

mla_cuda_status mla_cuda_write(void* to, const void* host, size_t bytes) {
    MLA_EXPECT((to && host) || bytes == 0, "mla_cuda_write: a null pointer");
    MLA_LAUNCH(copy_to_device(to, host, bytes));
    return MLA_CUDA_OK;
}

mla_cuda_status mla_cuda_wait(void* stream) {
    MLA_LAUNCH(wait_for(stream));
    return MLA_CUDA_OK;
}

}  // extern "C"
