// One call of latent_attention() after its checks: what absorbed.cpp and expanded.cpp work from.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/latent_attention.h"
#include "cpu/weights.h"
#include "cpu/workspace.h"

namespace mla::cpu {

struct Call {
    const LatentAttentionParams* params;
    AttentionDims dims;
    Record record;
    const KernelTable* kernels;
    int64_t q_stride, kv_stride, output_stride;

    const float* q(int64_t b, int64_t s, int head) const {
        return params->q + (b * params->steps + s) * q_stride +
               static_cast<int64_t>(head) * (dims.nope + dims.rope);
    }
    float* output(int64_t b, int64_t s, int head) const {
        return params->output + (b * params->steps + s) * output_stride +
               static_cast<int64_t>(head) * dims.v;
    }
    const float* cos(int64_t b, int64_t s) const {
        return params->cos + (b * params->steps + s) * (dims.rope / 2);
    }
    const float* sin(int64_t b, int64_t s) const {
        return params->sin + (b * params->steps + s) * (dims.rope / 2);
    }
    const int64_t* pages(int64_t b) const { return params->block_table + b * params->table_pages; }
    int64_t past(int64_t b) const { return params->past_lengths[b]; }
    int64_t fresh(int64_t b) const { return params->new_lengths[b]; }
};

// log2(e): scores are kept in units of log2.
constexpr float kLog2E = 1.4426950408889634f;

// RoPE on neighbouring pairs, times `scale`.
inline void rotate(const float* x, const float* cos, const float* sin, int rope, float scale,
                   float* out) {
    for (int i = 0; i < rope / 2; ++i) {
        const float even = x[2 * i], odd = x[2 * i + 1];
        out[2 * i] = (even * cos[i] - odd * sin[i]) * scale;
        out[2 * i + 1] = (even * sin[i] + odd * cos[i]) * scale;
    }
}

// Runs `body(i)` for 0 <= i < count on the caller's threads.
template <class Body>
void parallel_for(const ParallelFor& parallel, int64_t count, const Body& body) {
    if (count <= 0) return;
    if (!parallel.run || parallel.threads <= 1 || count == 1) {
        for (int64_t i = 0; i < count; ++i) body(i);
        return;
    }
    parallel.run(
        parallel.context, count,
        [](void* argument, int64_t index) { (*static_cast<const Body*>(argument))(index); },
        const_cast<Body*>(&body));
}

// Scratch memory of running tasks: a task takes a free slot and gives it back. There is one more
// slot than threads; should a caller run more tasks at once than it said, they wait for a slot.
class ScratchPool {
  public:
    static constexpr int kMaxSlots = 257;

    static int slots_for(const ParallelFor& parallel) {
        if (!parallel.run || parallel.threads <= 1) return 1;
        return parallel.threads < kMaxSlots - 1 ? parallel.threads + 1 : kMaxSlots;
    }

    ScratchPool(uint8_t* memory, size_t slot_bytes, int slots)
        : memory_(memory), slot_bytes_(slot_bytes), slots_(slots) {
        for (auto& taken : taken_) taken.store(false, std::memory_order_relaxed);
    }

    int acquire(int64_t hint) {
        for (int64_t i = hint;; ++i) {
            const int slot = static_cast<int>(i % slots_);
            bool expected = false;
            if (taken_[slot].compare_exchange_strong(expected, true, std::memory_order_acquire))
                return slot;
        }
    }
    void release(int slot) { taken_[slot].store(false, std::memory_order_release); }
    uint8_t* memory(int slot) const { return memory_ + slot_bytes_ * static_cast<size_t>(slot); }

  private:
    uint8_t* memory_;
    size_t slot_bytes_;
    int slots_;
    std::atomic<bool> taken_[kMaxSlots];
};

class Scratch {
  public:
    Scratch(ScratchPool& pool, int64_t hint) : pool_(pool), slot_(pool.acquire(hint)) {}
    ~Scratch() { pool_.release(slot_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    uint8_t* memory() const { return pool_.memory(slot_); }

  private:
    ScratchPool& pool_;
    int slot_;
};

// Encodes all new tokens; `also(i)` for 0 <= i < also_count runs in the same parallel region.
int64_t encode_task_count(const Call& call);
void run_encode_task(const Call& call, int64_t index);

// The tokens of sequences whose mode is absorbed / expanded, given as [batch] flags. Encodes too.
Status attend_absorbed(const Call& call, const bool* is_mine, bool encode_first);
Status attend_expanded(const Call& call, int64_t sequence);

}  // namespace mla::cpu
