// A GPU of one block at a time, for tests: what device.h needs where there is no nvcc.
//
// The threads of a block are fibers. A warp's instruction waits until its 32 lanes have come to
// it, a barrier until all threads have; whoever leaves a partner waiting ends the program with a
// text. Between two barriers each warp runs alone, in an order that changes from barrier to
// barrier (MLA_EMULATION_SEED), so that code which lacks a barrier sees memory too old or too new.
// Asynchronous copies happen as late as they may: in the wait that ends them. Shared memory starts
// as NaNs, and is a heap block of exactly its size, so that AddressSanitizer sees what leaves it.
//
// Reads and writes of shared memory through load(), store() and copy_async() are compared with the
// 32 banks: mla_cuda_emulation_wavefronts() has what a launch took, and what it would have taken
// without conflicts.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cpu/half.h"

namespace mla::cuda {
struct Thread;
}

namespace mla::cuda::emulation {

using cpu::bits_float;
using cpu::float_bits;

inline float half_value(uint16_t bits) { return cpu::half_to_float(bits); }
inline uint16_t half_bits(float x) { return cpu::float_to_half(x); }

using Body = void (*)(const void* context, const Thread& thread);

// Runs the blocks of a grid one after the other; each thread calls body(context, thread).
void run_grid(int x, int y, int z, int threads, size_t shared_bytes, Body body,
              const void* context);

void barrier();
uint32_t shuffle_xor(uint32_t value, int mask);
inline bool any(bool is_true) {
    uint32_t found = is_true;
    for (int mask = 1; mask < 32; mask *= 2) found |= shuffle_xor(found, mask);
    return found;
}
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void load_matrices(uint32_t (&d)[4], const void* shared, bool transposed);
void copy_async(void* shared, const void* global, int bytes);
void commit_copies();
void wait_copies(int pending);

// Every load and store comes by here: checks the alignment, notes the banks.
void touch(const void* at, size_t bytes, size_t alignment);

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = a | static_cast<uint64_t>(b) << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i) {
        const uint32_t from = (selector >> (4 * i)) & 7;
        out |= static_cast<uint32_t>((both >> (8 * from)) & 0xff) << (8 * i);
    }
    return out;
}

// One operation on both halves, rounded once: float holds products of halves exactly, and sums to
// well below half precision.
template <class Operation>
uint32_t by_halves(uint32_t a, uint32_t b, const Operation& operation) {
    uint32_t out = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const auto half = [shift](uint32_t x) {
            return half_value(static_cast<uint16_t>(x >> shift));
        };
        out |= static_cast<uint32_t>(half_bits(operation(half(a), half(b)))) << shift;
    }
    return out;
}

inline float exp2_flushed(float x) { return x < -126 ? 0.0f : std::exp2(x); }
inline float square_root(float x) { return std::sqrt(x); }
inline float round_to_even(float x) { return std::nearbyint(x); }

}  // namespace mla::cuda::emulation

// Wavefronts of shared memory in launch `launch` (0: the first) since the last call with a negative
// `launch`, which forgets all: taken, and without bank conflicts. 0 if there was such a launch.
extern "C" __attribute__((visibility("default"))) int mla_cuda_emulation_wavefronts(int launch,
                                                                                    int64_t* taken,
                                                                                    int64_t* ideal);
