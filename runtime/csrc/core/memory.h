// Where the pages of the cache are: memory of the host, or of a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace mla::core {

// Safe in any thread, as far as threads work on different bytes.
class CacheMemory {
  public:
    virtual ~CacheMemory() = default;

    // Zeroed memory, at a cache line; null: there is not as much. Only this class, and the graph,
    // may follow the pointer.
    virtual uint8_t* allocate(size_t bytes) = 0;
    virtual void release(uint8_t* memory, size_t bytes) noexcept = 0;

    // They may still be under way when they return; `finish` waits for them.
    virtual void clear(uint8_t* memory, size_t bytes) = 0;
    virtual void copy(uint8_t* to, const uint8_t* from, size_t bytes) = 0;
    virtual void finish() = 0;

    // To and from memory of the host; done when they return.
    virtual void read(void* host, const uint8_t* from, size_t bytes) = 0;
    virtual void write(uint8_t* to, const void* host, size_t bytes) = 0;
};

// The system provides a page of it when it is first written.
std::shared_ptr<CacheMemory> host_memory();

// Memory of the first CUDA device that the process sees, through libmla_deploy_cuda.so, which stays
// loaded until the process ends. All of it is taken at once. Its functions throw MLA_MODEL_FAILED
// when the device fails.
// Errors: MLA_BAD_RUNTIME: no such library, or no driver or device that it could use.
std::shared_ptr<CacheMemory> cuda_memory(const std::string& library);

}  // namespace mla::core
