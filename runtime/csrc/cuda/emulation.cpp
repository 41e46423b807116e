#include "cuda/emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "cuda/device.h"

namespace mla::cuda::emulation {
namespace {

constexpr int kLanes = kWarpLanes;
constexpr size_t kStackBytes = 64 << 10;

[[noreturn]] void die(const char* text, int thread) {
    std::fprintf(stderr, "CUDA emulation: thread %d: %s\n", thread, text);
    std::abort();
}

enum class Waits { kNothing, kBarrier, kShuffle, kMma, kExited };

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Fiber {
    Thread thread;
    Waits waits;
    void* operands;                         // of the warp's instruction
    std::vector<std::vector<Copy>> copies;  // groups, the oldest first; the last one is open
    ucontext_t start;
    jmp_buf resume;
    bool started;
    std::unique_ptr<uint8_t[]> stack;
};

struct Shuffle {
    uint32_t value;
    int mask;
    uint32_t result;
};

struct Mma {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};

float lane_half(uint32_t pair, int odd) {
    return half_value(static_cast<uint16_t>(pair >> (16 * odd)));
}

// From the definition, by element: a [16, 16], b [16, 8], d [16, 8].
void run_mma(void* const* operands) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const Mma& mine = *static_cast<const Mma*>(operands[lane]);
        const int group = lane / 4, quad = lane % 4;
        for (int i = 0; i < 8; ++i)
            a[group + 8 * (i / 2 % 2)][2 * quad + i % 2 + 8 * (i / 4)] =
                lane_half(mine.a[i / 2], i % 2);
        for (int i = 0; i < 4; ++i)
            b[2 * quad + i % 2 + 8 * (i / 2)][group] = lane_half(mine.b[i / 2], i % 2);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        const Mma& mine = *static_cast<const Mma*>(operands[lane]);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            float sum = 0;
            for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
            mine.d[i] += sum;
        }
    }
}

void run_shuffle(void* const* operands) {
    for (int lane = 0; lane < kLanes; ++lane) {
        Shuffle& mine = *static_cast<Shuffle*>(operands[lane]);
        mine.result = static_cast<const Shuffle*>(operands[lane ^ mine.mask])->value;
    }
}

class Block {
  public:
    explicit Block(int threads) : fibers_(static_cast<size_t>(threads)) {
        if (threads % kLanes) die("the block is no whole number of warps", threads);
        for (Fiber& fiber : fibers_) fiber.stack.reset(new uint8_t[kStackBytes]);
        const char* seed = std::getenv("MLA_EMULATION_SEED");
        random_.seed(seed ? static_cast<unsigned>(std::atoi(seed)) : 1u);
    }

    void run(int x, int y, int z, size_t shared_bytes, Body body, const void* context) {
        const std::unique_ptr<void, decltype(&std::free)> memory(
            aligned_alloc(128, (shared_bytes + 127) / 128 * 128), std::free);
        uint8_t* shared = static_cast<uint8_t*>(memory.get());
        std::memset(shared, 0xff, shared_bytes);
        body_ = body;
        context_ = context;
        for (size_t i = 0; i < fibers_.size(); ++i) {
            Fiber& fiber = fibers_[i];
            fiber.thread = {static_cast<int>(i), x, y, z, shared};
            fiber.waits = Waits::kNothing;
            fiber.started = false;
            fiber.copies.assign(1, {});
        }
        while (!all(Waits::kExited)) {
            std::vector<size_t> order(fibers_.size() / kLanes);
            for (size_t w = 0; w < order.size(); ++w) order[w] = w;
            std::shuffle(order.begin(), order.end(), random_);
            for (const size_t warp : order) run_warp(&fibers_[warp * kLanes]);
            if (all(Waits::kBarrier)) {
                for (Fiber& fiber : fibers_) fiber.waits = Waits::kNothing;
            } else if (!all(Waits::kExited)) {
                die("some threads wait at a barrier that others never reach", 0);
            }
        }
    }

    // Called on a fiber: gives the processor back until what it waits for has happened.
    void wait(Waits what, void* operands) {
        current_->waits = what;
        current_->operands = operands;
        if (_setjmp(current_->resume) == 0) _longjmp(scheduler_, 1);
    }

    Fiber& current() { return *current_; }

  private:
    static void enter();

    bool all(Waits what) const {
        for (const Fiber& fiber : fibers_)
            if (fiber.waits != what) return false;
        return true;
    }

    // Until all of its lanes wait at the barrier, or have ended.
    void run_warp(Fiber* lanes) {
        for (;;) {
            for (int i = 0; i < kLanes; ++i)
                if (lanes[i].waits == Waits::kNothing) step(lanes[i]);
            const Waits what = lanes[0].waits;
            for (int i = 1; i < kLanes; ++i)
                if (lanes[i].waits != what)
                    die("the lanes of its warp came to different instructions",
                        lanes[i].thread.index);
            if (what == Waits::kBarrier || what == Waits::kExited) return;
            void* operands[kLanes];
            for (int i = 0; i < kLanes; ++i) operands[i] = lanes[i].operands;
            if (what == Waits::kMma)
                run_mma(operands);
            else
                run_shuffle(operands);
            for (int i = 0; i < kLanes; ++i) lanes[i].waits = Waits::kNothing;
        }
    }

    void step(Fiber& fiber) {
        current_ = &fiber;
        if (_setjmp(scheduler_) != 0) return;
        if (fiber.started) _longjmp(fiber.resume, 1);
        fiber.started = true;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = kStackBytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, &Block::enter, 0);
        setcontext(&fiber.start);
    }

    std::vector<Fiber> fibers_;
    Fiber* current_ = nullptr;
    jmp_buf scheduler_;
    Body body_ = nullptr;
    const void* context_ = nullptr;
    std::mt19937 random_;
};

thread_local Block* running = nullptr;

void Block::enter() {
    Block& block = *running;
    block.body_(block.context_, block.current_->thread);
    block.wait(Waits::kExited, nullptr);
}

}  // namespace

void run_grid(int x, int y, int z, int threads, size_t shared_bytes, Body body,
              const void* context) {
    Block block(threads);
    running = &block;
    for (int k = 0; k < z; ++k)
        for (int j = 0; j < y; ++j)
            for (int i = 0; i < x; ++i) block.run(i, j, k, shared_bytes, body, context);
    running = nullptr;
}

void barrier() { running->wait(Waits::kBarrier, nullptr); }

uint32_t shuffle_xor(uint32_t value, int mask) {
    Shuffle shuffle{value, mask, 0};
    running->wait(Waits::kShuffle, &shuffle);
    return shuffle.result;
}

void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    Mma operands{d, a, {b0, b1}};
    running->wait(Waits::kMma, &operands);
}

void copy_async(void* shared, const void* global, int bytes) {
    expect_aligned(shared, 16);
    expect_aligned(global, 16);
    if (bytes < 0 || bytes > 16) die("a copy of other than 0 to 16 bytes", bytes);
    running->current().copies.back().push_back({shared, global, bytes});
}

void commit_copies() { running->current().copies.emplace_back(); }

void wait_copies(int pending) {
    auto& groups = running->current().copies;
    while (static_cast<int>(groups.size()) - 1 > pending) {
        for (const Copy& copy : groups.front()) {
            std::memset(copy.to, 0, 16);
            std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
        }
        groups.erase(groups.begin());
    }
}

void expect_aligned(const void* at, size_t alignment) {
    if (reinterpret_cast<uintptr_t>(at) % alignment)
        die("an address is not aligned to what it is read or written as",
            running ? running->current().thread.index : -1);
}

}  // namespace mla::cuda::emulation
