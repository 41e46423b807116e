// Memory that a call carves up and the next call reuses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace mla::cpu {

constexpr size_t kAlign = 64;

inline size_t align_up(size_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

inline void* allocate(size_t bytes) {
    return std::aligned_alloc(kAlign, align_up(bytes ? bytes : 1));
}

struct Workspace {
    uint8_t* memory = nullptr;
    size_t capacity = 0;

    bool reserve(size_t bytes) {
        if (bytes <= capacity) return true;
        std::free(memory);
        // Growing by half at least: a context that gets longer token by token settles quickly.
        size_t wanted = capacity + capacity / 2;
        if (wanted < bytes) wanted = bytes;
        memory = static_cast<uint8_t*>(allocate(wanted));
        capacity = memory ? align_up(wanted) : 0;
        return memory != nullptr;
    }
};

// Lays arrays out: first with memory == null, to measure; then again to hand them out.
class Carver {
  public:
    explicit Carver(uint8_t* memory) : memory_(memory) {}

    template <class T>
    T* take(int64_t count) {
        T* result = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
        used_ += align_up(static_cast<size_t>(count) * sizeof(T));
        return result;
    }

    size_t used() const { return used_; }

  private:
    uint8_t* memory_;
    size_t used_ = 0;
};

}  // namespace mla::cpu
