// A GPU for tests of the engine: memory that nobody but "the device" can touch, behind the
// functions of mla_deploy/cuda.h, and an onnxruntime whose CUDA provider is its CPU.
//
// One library is both for the engine, as both must know the memory: it can be read and written
// while a graph runs, and in the functions below. A touch at any other time ends the process. What
// may be done later (clear, copy) is done as late as it may, and a graph that runs before that
// fails.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "mla_deploy/cuda.h"

namespace {

std::mutex mutex;
std::map<uint8_t*, size_t> regions;           // of memory, by where they begin
std::vector<std::function<void()>> enqueued;  // and not done yet
int64_t operations_left = -1;                 // before one fails; negative: none does
int runs = 0;                                 // graphs that are running
// What was bound when a session made a recording ("CUDA graph") of a step, by its id.
std::map<const void*, std::map<std::string, const void*>> recordings;
size_t recordings_made = 0;
std::string error = "no call has failed";

// While it lives, the memory can be touched. Holds the mutex.
class Touch {
  public:
    Touch() : lock_(mutex) { protect(PROT_READ | PROT_WRITE); }
    ~Touch() {
        if (runs == 0) protect(PROT_NONE);
    }

    static void protect(int access) {
        for (const auto& [memory, bytes] : regions) {
            if (mprotect(memory, bytes, access) != 0) std::abort();
        }
    }

  private:
    const std::lock_guard<std::mutex> lock_;
};

mla_cuda_status fail(mla_cuda_status status, const char* text) {
    error = text;
    return status;
}

bool fails_now() { return operations_left == 0 || (operations_left > 0 && --operations_left < 0); }

// Whether the bytes are in one region: of what is not, the device knows nothing.
bool is_device(const void* memory, size_t bytes) {
    const auto* first = static_cast<const uint8_t*>(memory);
    for (const auto& [begin, size] : regions) {
        if (first >= begin && first + bytes <= begin + size) return true;
    }
    return false;
}

mla_cuda_status check(const void* device, size_t bytes, const void* host = nullptr) {
    if (fails_now()) return fail(MLA_CUDA_FAILED, "an operation that was to fail");
    if (!is_device(device, bytes) || (host != nullptr && is_device(host, bytes))) {
        return fail(MLA_CUDA_BAD_ARGUMENT, "memory of the wrong side");
    }
    return MLA_CUDA_OK;
}

void do_all() {
    for (const auto& work : enqueued) work();
    enqueued.clear();
}

}  // namespace

extern "C" {

// The operation after so many more fails, and all that follow; negative: none.
MLA_API void double_fail_after(int64_t operations) { operations_left = operations; }

MLA_API size_t double_regions() { return regions.size(); }

MLA_API size_t double_recordings() { return recordings_made; }

MLA_API const char* mla_cuda_last_error(void) { return error.c_str(); }

MLA_API mla_cuda_status mla_cuda_check_device(void) {
    const char* broken = std::getenv("MLA_TEST_DOUBLE_DEVICE");
    return broken == nullptr ? MLA_CUDA_OK : fail(MLA_CUDA_UNSUPPORTED, broken);
}

MLA_API mla_cuda_status mla_cuda_allocate(void** memory, size_t bytes) {
    const Touch touch;
    if (operations_left == 0) return fail(MLA_CUDA_NO_MEMORY, "there is no memory");
    void* const made = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) return fail(MLA_CUDA_NO_MEMORY, "there is no memory");
    regions[static_cast<uint8_t*>(made)] = bytes;
    *memory = made;
    return MLA_CUDA_OK;
}

MLA_API mla_cuda_status mla_cuda_release(void* memory) {
    const Touch touch;
    const auto found = regions.find(static_cast<uint8_t*>(memory));
    if (found == regions.end()) std::abort();
    munmap(memory, found->second);
    regions.erase(found);
    return MLA_CUDA_OK;
}

MLA_API mla_cuda_status mla_cuda_clear(void* memory, size_t bytes, void*) {
    const std::lock_guard<std::mutex> lock(mutex);
    const mla_cuda_status status = check(memory, bytes);
    if (status == MLA_CUDA_OK) enqueued.push_back([=] { std::memset(memory, 0, bytes); });
    return status;
}

MLA_API mla_cuda_status mla_cuda_copy(void* to, const void* from, size_t bytes, void*) {
    const std::lock_guard<std::mutex> lock(mutex);
    mla_cuda_status status = check(to, bytes);
    if (status == MLA_CUDA_OK) status = check(from, bytes);
    if (status == MLA_CUDA_OK) enqueued.push_back([=] { std::memcpy(to, from, bytes); });
    return status;
}

MLA_API mla_cuda_status mla_cuda_read(void* host, const void* from, size_t bytes) {
    const Touch touch;
    const mla_cuda_status status = check(from, bytes, host);
    if (status == MLA_CUDA_OK) std::memcpy(host, from, bytes);
    return status;
}

MLA_API mla_cuda_status mla_cuda_write(void* to, const void* host, size_t bytes) {
    const Touch touch;
    const mla_cuda_status status = check(to, bytes, host);
    if (status == MLA_CUDA_OK) std::memcpy(to, host, bytes);
    return status;
}

MLA_API mla_cuda_status mla_cuda_wait(void*) {
    const Touch touch;
    if (fails_now()) {
        enqueued.clear();
        return fail(MLA_CUDA_FAILED, "an operation that was to fail");
    }
    do_all();
    return MLA_CUDA_OK;
}

}  // extern "C"

namespace {

const OrtApi* real;  // whose functions all others are

OrtStatus* ORT_API_CALL create_memory_info(const char* name, OrtAllocatorType type, int id,
                                           OrtMemType memory, OrtMemoryInfo** out) noexcept {
    const bool is_cuda = std::strcmp(name, "Cuda") == 0;
    return real->CreateMemoryInfo(is_cuda ? "Cpu" : name, type, id, memory, out);
}

OrtStatus* ORT_API_CALL create_options(OrtCUDAProviderOptionsV2** out) noexcept {
    const char* broken = std::getenv("MLA_TEST_DOUBLE_PROVIDER");
    if (broken != nullptr) return real->CreateStatus(ORT_FAIL, broken);
    *out = reinterpret_cast<OrtCUDAProviderOptionsV2*>(new int);
    return nullptr;
}

OrtStatus* ORT_API_CALL update_options(OrtCUDAProviderOptionsV2*, const char* const*,
                                       const char* const*, size_t) noexcept {
    return nullptr;
}

void ORT_API_CALL release_options(OrtCUDAProviderOptionsV2* options) noexcept {
    delete reinterpret_cast<int*>(options);
}

OrtStatus* ORT_API_CALL append_provider(OrtSessionOptions*,
                                        const OrtCUDAProviderOptionsV2*) noexcept {
    return nullptr;
}

thread_local std::string recording;  // of the run that this thread prepares

OrtStatus* ORT_API_CALL add_run_entry(OrtRunOptions* options, const char* key,
                                      const char* value) noexcept {
    if (std::strcmp(key, "gpu_graph_id") == 0) recording = value;
    return real->AddRunConfigEntry(options, key, value);
}

void ORT_API_CALL release_session(OrtSession* session) noexcept {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        recordings.erase(session);
    }
    real->ReleaseSession(session);
}

// A recording is repeated as it was made: what is bound has to be what was bound then. It is run
// three times when it is made, as onnxruntime does, to warm up and to record.
OrtStatus* ORT_API_CALL run_with_binding(OrtSession* session, const OrtRunOptions* options,
                                         const OrtIoBinding* binding) noexcept {
    int times = 1;
    {
        const Touch touch;
        if (!enqueued.empty()) return real->CreateStatus(ORT_FAIL, "the cache is not ready");
        if (recording != "-1") {
            const auto [found, is_new] = recordings[session].emplace(recording, binding);
            if (found->second != binding) return real->CreateStatus(ORT_FAIL, "bound otherwise");
            if (is_new) {
                ++recordings_made;
                times = 3;
            }
        }
        ++runs;
    }
    OrtStatus* status = nullptr;
    for (int i = 0; i < times && status == nullptr; ++i)
        status = real->RunWithBinding(session, options, binding);
    const Touch touch;
    --runs;
    return status;
}

const OrtApi* ORT_API_CALL get_api(uint32_t version) noexcept;
const char* ORT_API_CALL get_version() noexcept;

const OrtApiBase* real_base() {
    static const OrtApiBase* const base = [] {
        void* const library = dlopen(std::getenv("MLA_TEST_ONNXRUNTIME"), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) std::abort();
        using GetBase = const OrtApiBase* (*)();
        return reinterpret_cast<GetBase>(dlsym(library, "OrtGetApiBase"))();
    }();
    return base;
}

const OrtApi* ORT_API_CALL get_api(uint32_t version) noexcept {
    static const OrtApi api = [&] {
        real = real_base()->GetApi(version);
        OrtApi copy = *real;
        copy.CreateMemoryInfo = create_memory_info;
        copy.CreateCUDAProviderOptions = create_options;
        copy.UpdateCUDAProviderOptions = update_options;
        copy.ReleaseCUDAProviderOptions = release_options;
        copy.SessionOptionsAppendExecutionProvider_CUDA_V2 = append_provider;
        copy.AddRunConfigEntry = add_run_entry;
        copy.RunWithBinding = run_with_binding;
        copy.ReleaseSession = release_session;
        return copy;
    }();
    return &api;
}

const char* ORT_API_CALL get_version() noexcept { return real_base()->GetVersionString(); }

}  // namespace

extern "C" MLA_API const OrtApiBase* OrtGetApiBase() noexcept {
    static const OrtApiBase base = {get_api, get_version};
    return &base;
}
