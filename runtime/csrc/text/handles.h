// Handles that tell what was closed: numbers, never used twice, and a table of what they stand for.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "text/error.h"

namespace mla::text {

// Shared by all kinds, so that a handle of one kind is none of another.
uintptr_t next_handle();

template <class Handle, class Object>
class HandleTable {
  public:
    explicit HandleTable(const char* kind) : kind_(kind) {}

    Handle* open(std::shared_ptr<Object> object) {
        const uintptr_t number = next_handle();
        std::lock_guard<std::mutex> lock(mutex_);
        objects_.emplace(number, std::move(object));
        return reinterpret_cast<Handle*>(number);
    }

    // Keeps the object alive for the call, whoever closes the handle meanwhile.
    std::shared_ptr<Object> get(const Handle* handle) const {
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = objects_.find(reinterpret_cast<uintptr_t>(handle));
        if (found == objects_.end()) throw no_handle(handle);
        return found->second;
    }

    void close(const Handle* handle) {
        std::shared_ptr<Object> object;  // destroyed outside the lock
        std::lock_guard<std::mutex> lock(mutex_);
        const auto found = objects_.find(reinterpret_cast<uintptr_t>(handle));
        if (found == objects_.end()) throw no_handle(handle);
        object = std::move(found->second);
        objects_.erase(found);
    }

  private:
    Error no_handle(const Handle* handle) const {
        return Error(MLA_TEXT_INVALID_HANDLE, join("not the handle of an open ", kind_))
            .found(handle ? "one that was closed, or of another kind" : "null")
            .next("pass a handle between its creation and its end");
    }

    const char* kind_;
    mutable std::mutex mutex_;
    std::unordered_map<uintptr_t, std::shared_ptr<Object>> objects_;
};

}  // namespace mla::text
