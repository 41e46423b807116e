#include <sys/mman.h>

#include <cstring>

#include "core/memory.h"

namespace mla::core {

namespace {

class HostMemory : public CacheMemory {
  public:
    uint8_t* allocate(size_t bytes) override {
        void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        return memory == MAP_FAILED ? nullptr : static_cast<uint8_t*>(memory);
    }

    void release(uint8_t* memory, size_t bytes) noexcept override { munmap(memory, bytes); }

    void clear(uint8_t* memory, size_t bytes) override { std::memset(memory, 0, bytes); }

    void copy(uint8_t* to, const uint8_t* from, size_t bytes) override {
        std::memcpy(to, from, bytes);
    }

    void finish() override {}

    void read(void* host, const uint8_t* from, size_t bytes) override {
        std::memcpy(host, from, bytes);
    }

    void write(uint8_t* to, const void* host, size_t bytes) override {
        std::memcpy(to, host, bytes);
    }
};

}  // namespace

std::shared_ptr<CacheMemory> host_memory() { return std::make_shared<HostMemory>(); }

}  // namespace mla::core
