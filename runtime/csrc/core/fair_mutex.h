// A mutex that serves threads in the order in which they came.
//
// std::mutex promises no order: the thread that has just unlocked it may lock it again before a
// waiting one is awake, and a long prompt, chunk after chunk, could hold up all others to its end.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace mla::core {

class FairMutex {
  public:
    void lock() {
        std::unique_lock<std::mutex> lock(mutex_);
        const uint64_t ticket = next_++;
        turn_.wait(lock, [&] { return ticket == serving_; });
    }

    void unlock() {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++serving_;
        turn_.notify_all();
    }

  private:
    std::mutex mutex_;
    std::condition_variable turn_;
    uint64_t next_ = 0;
    uint64_t serving_ = 0;
};

}  // namespace mla::core
