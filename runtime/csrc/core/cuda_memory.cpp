#include <dlfcn.h>

#include "core/error.h"
#include "core/memory.h"
#include "mla_deploy/cuda.h"

namespace mla::core {

namespace {

Error unusable(const std::string& library, const std::string& found, const std::string& next) {
    return Error(MLA_BAD_RUNTIME, library + " cannot be used for the device cuda")
        .found(found)
        .next(next);
}

// The functions of the library. It is never closed: CUDA's threads outlive everything.
struct Functions {
    explicit Functions(const std::string& library) {
        void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (handle == nullptr) {
            throw unusable(library, dlerror(),
                           "install mla-deploy from source where there is nvcc 13: pip install . "
                           "-C cmake.define.MLA_CUDA=ON");
        }
        const auto find = [&](const char* name, auto*& function) {
            void* const symbol = dlsym(handle, name);
            if (symbol == nullptr) {
                throw unusable(library, std::string("it has no ") + name,
                               "name the libmla_deploy_cuda.so of this version of mla-deploy");
            }
            function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
        };
        find("mla_cuda_last_error", last_error);
        find("mla_cuda_check_device", check_device);
        find("mla_cuda_allocate", allocate);
        find("mla_cuda_release", release);
        find("mla_cuda_clear", clear);
        find("mla_cuda_copy", copy);
        find("mla_cuda_read", read);
        find("mla_cuda_write", write);
        find("mla_cuda_wait", wait);
        if (check_device() != MLA_CUDA_OK) {
            throw unusable(library, last_error(),
                           "run the model on the CPU: export it with --target cpu");
        }
    }

    decltype(&mla_cuda_last_error) last_error;
    decltype(&mla_cuda_check_device) check_device;
    decltype(&mla_cuda_allocate) allocate;
    decltype(&mla_cuda_release) release;
    decltype(&mla_cuda_clear) clear;
    decltype(&mla_cuda_copy) copy;
    decltype(&mla_cuda_read) read;
    decltype(&mla_cuda_write) write;
    decltype(&mla_cuda_wait) wait;
};

class CudaMemory : public CacheMemory {
  public:
    explicit CudaMemory(const std::string& library) : cuda_(library) {}

    uint8_t* allocate(size_t bytes) override {
        void* memory = nullptr;
        const mla_cuda_status status = cuda_.allocate(&memory, bytes);
        if (status == MLA_CUDA_NO_MEMORY) return nullptr;
        check(status);
        return static_cast<uint8_t*>(memory);
    }

    void release(uint8_t* memory, size_t) noexcept override { cuda_.release(memory); }

    void clear(uint8_t* memory, size_t bytes) override {
        check(cuda_.clear(memory, bytes, kStream));
    }

    void copy(uint8_t* to, const uint8_t* from, size_t bytes) override {
        check(cuda_.copy(to, from, bytes, kStream));
    }

    void finish() override { check(cuda_.wait(kStream)); }

    void read(void* host, const uint8_t* from, size_t bytes) override {
        check(cuda_.read(host, from, bytes));
    }

    void write(uint8_t* to, const void* host, size_t bytes) override {
        check(cuda_.write(to, host, bytes));
    }

  private:
    // onnxruntime has a stream of its own and waits for it at the end of a run; so do we with ours.
    static constexpr void* kStream = nullptr;

    void check(mla_cuda_status status) const {
        if (status == MLA_CUDA_OK) return;
        throw Error(MLA_MODEL_FAILED, "the device cannot keep the cache")
            .found(cuda_.last_error())
            .next("start the program again; if it happens again, use less memory or the CPU");
    }

    const Functions cuda_;
};

}  // namespace

std::shared_ptr<CacheMemory> cuda_memory(const std::string& library) {
    return std::make_shared<CudaMemory>(library);
}

}  // namespace mla::core
