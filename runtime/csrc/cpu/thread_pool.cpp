#include "cpu/thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace mla::cpu {
namespace {

constexpr int kSpins = 4000;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

}  // namespace

struct ThreadPool::State {
    std::mutex region;  // held by the caller whose tasks run
    std::mutex mutex;
    std::condition_variable wake;
    std::vector<std::thread> threads;
    std::atomic<uint64_t> generation{0};
    std::atomic<bool> stop{false};

    // The region: written before `generation` moves, read by threads that saw it move.
    void (*task)(void*, int64_t) = nullptr;
    void* argument = nullptr;
    int64_t count = 0;
    std::atomic<int64_t> next{0};
    std::atomic<int> busy{0};  // threads that have not yet left the region

    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
            task(argument, i);
    }

    void run_thread() {
        for (uint64_t seen = 0;;) {
            for (int i = 0; i < kSpins && generation.load(std::memory_order_acquire) == seen; ++i)
                pause();
            if (generation.load(std::memory_order_acquire) == seen) {
                std::unique_lock<std::mutex> lock(mutex);
                wake.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
            }
            ++seen;
            if (stop.load(std::memory_order_acquire)) return;
            work();
            busy.fetch_sub(1, std::memory_order_release);
        }
    }

    void start_generation() {
        {
            std::lock_guard<std::mutex> lock(mutex);
            generation.fetch_add(1, std::memory_order_release);
        }
        wake.notify_all();
    }

    void run(int64_t tasks, void (*body)(void*, int64_t), void* body_argument) {
        std::lock_guard<std::mutex> lock(region);
        task = body;
        argument = body_argument;
        count = tasks;
        next.store(0, std::memory_order_relaxed);
        busy.store(static_cast<int>(threads.size()), std::memory_order_relaxed);
        start_generation();
        work();
        for (int spins = 0; busy.load(std::memory_order_acquire) != 0; ++spins) {
            pause();
            if (spins > kSpins) std::this_thread::yield();
        }
    }
};

ThreadPool::ThreadPool(int threads) : state_(new State) {
    for (int i = 1; i < threads; ++i)
        state_->threads.emplace_back([state = state_] { state->run_thread(); });
}

ThreadPool::~ThreadPool() {
    state_->stop.store(true, std::memory_order_release);
    state_->start_generation();
    for (std::thread& thread : state_->threads) thread.join();
    delete state_;
}

ParallelFor ThreadPool::parallel_for() {
    ParallelFor parallel;
    parallel.context = state_;
    parallel.threads = static_cast<int>(state_->threads.size()) + 1;
    parallel.run = [](void* context, int64_t count, void (*task)(void*, int64_t), void* argument) {
        static_cast<State*>(context)->run(count, task, argument);
    };
    return parallel;
}

}  // namespace mla::cpu
