// Handles: numbers in the guise of pointers, and the objects they stand for.
//
// A handle is never dereferenced and no number is given twice, so that a closed one is found out
// for certain, which the address of a freed object cannot promise.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "core/error.h"

namespace mla::core {

// The next number, of all kinds of handles together.
uintptr_t next_handle();

template <class Handle, class Object>
class Handles {
  public:
    // kind: for errors, such as "session".
    explicit Handles(const char* kind) : kind_(kind) {}

    Handle* add(std::shared_ptr<Object> object) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const uintptr_t number = next_handle();
        objects_.emplace(number, std::move(object));
        return reinterpret_cast<Handle*>(number);
    }

    // The object, which lives at least as long as what is returned. Errors: MLA_INVALID_HANDLE.
    std::shared_ptr<Object> find(const Handle* handle) {
        const std::lock_guard<std::mutex> lock(mutex_);
        return locate(handle)->second;
    }

    // Forgets the handle. Errors: MLA_INVALID_HANDLE.
    std::shared_ptr<Object> remove(const Handle* handle) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = locate(handle);
        std::shared_ptr<Object> object = std::move(found->second);
        objects_.erase(found);
        return object;
    }

  private:
    typename std::unordered_map<uintptr_t, std::shared_ptr<Object>>::iterator locate(
        const Handle* handle) {
        const auto found = objects_.find(reinterpret_cast<uintptr_t>(handle));
        if (found != objects_.end()) return found;
        throw Error(MLA_INVALID_HANDLE, join("this is not a handle of a ", kind_))
            .found(handle == nullptr ? "null" : "one that was closed, or is of another kind")
            .next("use the handle that the library gave, until it is closed");
    }

    const char* kind_;
    std::mutex mutex_;
    std::unordered_map<uintptr_t, std::shared_ptr<Object>> objects_;
};

}  // namespace mla::core
