// A flag that stops a call of another thread, also while it is in the graph.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <set>
#include <utility>

#include "core/error.h"

namespace mla::core {

class Cancellation {
  public:
    void request() {
        const std::lock_guard<std::mutex> lock(mutex_);
        requested_ = true;
        for (const Interruptible* running : running_) running->interrupt_();
    }

    bool requested() const { return requested_; }

    void check() const {
        if (requested()) throw Error(MLA_CANCELLED, "the call was cancelled");
    }

    // While it lives, a request calls `interrupt`, in the thread that requests. For one requested
    // before, ask `requested` after it was made.
    class Interruptible {
      public:
        Interruptible(Cancellation& cancellation, std::function<void()> interrupt)
            : cancellation_(cancellation), interrupt_(std::move(interrupt)) {
            const std::lock_guard<std::mutex> lock(cancellation_.mutex_);
            cancellation_.running_.insert(this);
        }
        ~Interruptible() {
            const std::lock_guard<std::mutex> lock(cancellation_.mutex_);
            cancellation_.running_.erase(this);
        }
        Interruptible(const Interruptible&) = delete;
        Interruptible& operator=(const Interruptible&) = delete;

      private:
        friend class Cancellation;
        Cancellation& cancellation_;
        std::function<void()> interrupt_;
    };

  private:
    std::mutex mutex_;
    std::atomic<bool> requested_{false};
    std::set<const Interruptible*> running_;
};

}  // namespace mla::core
