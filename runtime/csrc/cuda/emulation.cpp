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

enum class Waits { kNothing, kBarrier, kShuffle, kMma, kMatrices, kExited };

struct Copy {
    void* to;
    const void* from;
    int bytes;
};

struct Access {
    const uint8_t* at;
    size_t bytes;
};

struct Wavefronts {
    int64_t taken, ideal;
};

struct Fiber {
    Thread thread;
    std::vector<Access> accesses;  // to shared memory, since the warp's last instruction
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

struct Matrices {
    uint32_t* d;
    const void* row;
    bool transposed;
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

void run_matrices(void* const* operands) {
    for (int matrix = 0; matrix < 4; ++matrix) {
        uint16_t element[8][8];
        for (int row = 0; row < 8; ++row)
            std::memcpy(element[row], static_cast<const Matrices*>(operands[8 * matrix + row])->row,
                        16);
        for (int lane = 0; lane < kLanes; ++lane) {
            const Matrices& mine = *static_cast<const Matrices*>(operands[lane]);
            const int group = lane / 4, pair = 2 * (lane % 4);
            const uint32_t low = mine.transposed ? element[pair][group] : element[group][pair];
            const uint32_t high =
                mine.transposed ? element[pair + 1][group] : element[group][pair + 1];
            mine.d[matrix] = low | high << 16;
        }
    }
}

void run_shuffle(void* const* operands) {
    for (int lane = 0; lane < kLanes; ++lane) {
        Shuffle& mine = *static_cast<Shuffle*>(operands[lane]);
        mine.result = static_cast<const Shuffle*>(operands[lane ^ mine.mask])->value;
    }
}

// Wavefronts of one access by the lanes of a warp: 128 bytes go at once, where no bank has to give
// two different words.
int64_t count_wavefronts(const Access* const* lanes, const uint8_t* shared) {
    const int at_once = lanes[0]->bytes <= 4 ? kLanes : static_cast<int>(128 / lanes[0]->bytes);
    int64_t taken = 0;
    for (int first = 0; first < kLanes; first += at_once) {
        std::vector<int64_t> words[kLanes];  // different ones, by bank
        size_t most = 0;
        for (int i = first; i < first + at_once; ++i) {
            const int64_t begin = (lanes[i]->at - shared) / 4;
            const int64_t end =
                (lanes[i]->at - shared + static_cast<int64_t>(lanes[i]->bytes) + 3) / 4;
            for (int64_t word = begin; word < end; ++word) {
                std::vector<int64_t>& bank = words[word % kLanes];
                if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
                most = std::max(most, bank.size());
            }
        }
        taken += static_cast<int64_t>(most);
    }
    return taken;
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
        shared_ = shared;
        shared_bytes_ = shared_bytes;
        body_ = body;
        context_ = context;
        for (size_t i = 0; i < fibers_.size(); ++i) {
            Fiber& fiber = fibers_[i];
            fiber.thread = {static_cast<int>(i), x, y, z, shared};
            fiber.waits = Waits::kNothing;
            fiber.started = false;
            fiber.copies.assign(1, {});
            fiber.accesses.clear();
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

    void note_access(const void* at, size_t bytes) {
        const uint8_t* byte = static_cast<const uint8_t*>(at);
        if (byte >= shared_ && byte < shared_ + shared_bytes_)
            current_->accesses.push_back({byte, bytes});
    }

    const Wavefronts& wavefronts() const { return wavefronts_; }

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
            count_accesses(lanes);
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
            else if (what == Waits::kMatrices)
                run_matrices(operands);
            else
                run_shuffle(operands);
            for (int i = 0; i < kLanes; ++i) lanes[i].waits = Waits::kNothing;
        }
    }

    // Lanes that went the same way made the same accesses; others are not compared.
    void count_accesses(Fiber* lanes) {
        bool alike = true;
        for (int i = 1; i < kLanes; ++i)
            alike = alike && lanes[i].accesses.size() == lanes[0].accesses.size();
        for (size_t k = 0; alike && k < lanes[0].accesses.size(); ++k) {
            const Access* access[kLanes];
            for (int i = 0; i < kLanes; ++i) access[i] = &lanes[i].accesses[k];
            wavefronts_.taken += count_wavefronts(access, shared_);
            const size_t bytes = access[0]->bytes;
            wavefronts_.ideal += bytes <= 4 ? 1 : static_cast<int64_t>(bytes / 4);
        }
        for (int i = 0; i < kLanes; ++i) lanes[i].accesses.clear();
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
    const uint8_t* shared_ = nullptr;
    size_t shared_bytes_ = 0;
    Wavefronts wavefronts_ = {0, 0};
    std::mt19937 random_;
};

thread_local Block* running = nullptr;
thread_local std::vector<Wavefronts> launches;

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
    launches.push_back(block.wavefronts());
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

void load_matrices(uint32_t (&d)[4], const void* shared, bool transposed) {
    touch(shared, 16, 16);
    Matrices operands{d, shared, transposed};
    running->wait(Waits::kMatrices, &operands);
}

void copy_async(void* shared, const void* global, int bytes) {
    touch(shared, 16, 16);
    touch(global, 16, 16);
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

void touch(const void* at, size_t bytes, size_t alignment) {
    if (reinterpret_cast<uintptr_t>(at) % alignment)
        die("an address is not aligned to what it is read or written as",
            running ? running->current().thread.index : -1);
    if (running) running->note_access(at, bytes);
}

}  // namespace mla::cuda::emulation

int mla_cuda_emulation_wavefronts(int launch, int64_t* taken, int64_t* ideal) {
    using mla::cuda::emulation::launches;
    if (launch < 0) launches.clear();
    if (launch < 0 || launch >= static_cast<int>(launches.size())) return 1;
    *taken = launches[static_cast<size_t>(launch)].taken;
    *ideal = launches[static_cast<size_t>(launch)].ideal;
    return 0;
}
