// A small pool of threads behind ParallelFor, for hosts that bring none of their own.
#pragma once

#include "cpu/latent_attention.h"

namespace mla::cpu {

// Runs one region at a time: calls from several threads take turns. Idle threads spin for some
// tens of microseconds, which is what lies between two regions of a call, and sleep after that.
class ThreadPool {
  public:
    // The calling thread works too, so `threads - 1` are started; fewer than 2 starts none.
    explicit ThreadPool(int threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    // Valid as long as the pool.
    ParallelFor parallel_for();

  private:
    struct State;
    State* state_;
};

}  // namespace mla::cpu
