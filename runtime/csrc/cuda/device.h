// What a kernel of this folder may use of the machine: one thread's view of a block, and the
// handful of instructions that C++ has no words for.
//
// Kernels are ordinary per-thread code over these functions. nvcc compiles them for the GPU; any
// other compiler gets the same functions from emulation.h, where a block's threads are fibers and
// a warp's instructions are loops over 32 lanes. So one source runs on both, and indices,
// fragments, masks and barriers are tested without a GPU.
//
// Half precision is kept as bits: `uint32_t` holds two values, the lower one in the lower half.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define MLA_DEVICE __device__ __forceinline__
#define MLA_CONSTEXPR __host__ __device__ constexpr
#define MLA_UNROLL _Pragma("unroll")
#define MLA_PRAGMA(text) _Pragma(#text)
#define MLA_UNROLL_BY(times) MLA_PRAGMA(unroll times)
#define MLA_NO_UNROLL _Pragma("unroll 1")
#else
#include "cuda/emulation.h"
#define MLA_DEVICE inline
#define MLA_CONSTEXPR constexpr
#define MLA_UNROLL
#define MLA_UNROLL_BY(times)
#define MLA_NO_UNROLL
#endif

namespace mla::cuda {

constexpr int kWarpLanes = 32;

// Who a thread is. `shared` is the block's dynamic shared memory, 128-byte aligned.
struct Thread {
    int index;  // in the block
    int block_x, block_y, block_z;
    uint8_t* shared;

    MLA_DEVICE int warp() const { return index / kWarpLanes; }
    MLA_DEVICE int lane() const { return index % kWarpLanes; }
};

#ifdef __CUDACC__
// The compiler's own vectors: structs of ours would be read and written by the word.
using Words1 = uint1;
using Words2 = uint2;
using Words4 = uint4;
using Floats2 = float2;
using Floats4 = float4;
#else
struct alignas(4) Words1 {
    uint32_t x;
};
struct alignas(8) Words2 {
    uint32_t x, y;
};
struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};
struct alignas(8) Floats2 {
    float x, y;
};
struct alignas(16) Floats4 {
    float x, y, z, w;
};
#endif

#ifdef __CUDACC__

// ---- the block and the warp -----------------------------------------------------------------

// All threads of the block have come here, and see what the others wrote to shared memory.
MLA_DEVICE void barrier() { __syncthreads(); }

MLA_DEVICE float shuffle_xor(float value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
MLA_DEVICE uint32_t shuffle_xor(uint32_t value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}

// Whether it is true for any lane of the warp.
MLA_DEVICE bool any(bool is_true) { return __any_sync(0xffffffffu, is_true); }

// Waits until the kernel before this one has finished, and lets the next one be launched: so that
// has a start at which all kernels but this one have finished, and waits in turn before it reads
// what this one writes. Nothing, where it was launched after their end (Params::overlaps).
MLA_DEVICE void begin_overlapped() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// d += a b on the tensor cores: a [16, 16] and b [16, 8] in half, d [16, 8] in float. With
// group = lane / 4 and quad = lane % 4, a lane holds
//   a[0] row group,     columns 2 quad, 2 quad + 1      a[2] the same row, columns + 8
//   a[1] row group + 8, columns 2 quad, 2 quad + 1      a[3] the same row, columns + 8
//   b0 rows 2 quad, 2 quad + 1 of column group          b1 rows + 8
//   d[0], d[1] row group, columns 2 quad, 2 quad + 1    d[2], d[3] row group + 8
// (PTX ISA, mma.m16n8k16).
MLA_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of halves from shared memory: lane i gives the address of row i % 8 of matrix
// i / 8, 16 bytes. Of matrix m, d[m] has columns 2 quad and 2 quad + 1 of row `group`; transposed:
// rows 2 quad and 2 quad + 1 of column `group` (PTX ISA, ldmatrix).
MLA_DEVICE void load_matrices(uint32_t (&d)[4], const void* shared) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
}
MLA_DEVICE void load_matrices_transposed(uint32_t (&d)[4], const void* shared) {
    const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(from)
                 : "memory");
}

// ---- copies that run on their own -----------------------------------------------------------

// Starts to copy 16 bytes to shared memory; those from `bytes` (0 to 16) on become zeros and are
// not read. Both addresses are multiples of 16.
MLA_DEVICE void copy_async(void* shared, const void* global, int bytes) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes)
                 : "memory");
}
// All 16 bytes, `Offset` bytes on at both ends: an offset in the instruction takes no register.
template <int Offset>
MLA_DEVICE void copy_async_at(void* shared, const void* global) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %2], 16;" ::"r"(to), "l"(global),
                 "n"(Offset)
                 : "memory");
}
// Brings what is at an address nearer; nobody waits for it.
MLA_DEVICE void prefetch(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}
// What this thread has started since the last call is one group.
MLA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most the `pending` newest groups of this thread (0 to 3) still run.
MLA_DEVICE void wait_copies(int pending) {
    if (pending == 0) {
        asm volatile("cp.async.wait_group 0;" ::: "memory");
    } else if (pending == 1) {
        asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else if (pending == 2) {
        asm volatile("cp.async.wait_group 2;" ::: "memory");
    } else {
        asm volatile("cp.async.wait_group 3;" ::: "memory");
    }
}

// ---- arithmetic -----------------------------------------------------------------------------

MLA_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
MLA_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
MLA_DEVICE float half_value(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
MLA_DEVICE uint16_t half_bits(float x) { return __half_as_ushort(__float2half_rn(x)); }

// Bytes of b:a (a the lower ones) by the four nibbles of `selector`, lowest first.
MLA_DEVICE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}

MLA_DEVICE __half2 as_half2(uint32_t bits) { return *reinterpret_cast<const __half2*>(&bits); }
MLA_DEVICE uint32_t as_bits(__half2 x) { return *reinterpret_cast<const uint32_t*>(&x); }

MLA_DEVICE uint32_t pack_half2(float low, float high) {
    return as_bits(__floats2half2_rn(low, high));
}
MLA_DEVICE uint32_t half2_sub(uint32_t a, uint32_t b) {
    return as_bits(__hsub2(as_half2(a), as_half2(b)));
}
MLA_DEVICE uint32_t half2_mul(uint32_t a, uint32_t b) {
    return as_bits(__hmul2(as_half2(a), as_half2(b)));
}
// The larger number, where neither is NaN.
MLA_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
// 2^x, to about 2 units in the last place; exactly 1 for 0 and 0 for -1e30.
MLA_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Each rounded on its own, never contracted: what is appended must not depend on the compiler.
MLA_DEVICE float add_exact(float a, float b) { return __fadd_rn(a, b); }
MLA_DEVICE float sub_exact(float a, float b) { return __fsub_rn(a, b); }
MLA_DEVICE float mul_exact(float a, float b) { return __fmul_rn(a, b); }
MLA_DEVICE float div_exact(float a, float b) { return __fdiv_rn(a, b); }
MLA_DEVICE float sqrt_exact(float x) { return __fsqrt_rn(x); }
MLA_DEVICE float round_to_even(float x) { return rintf(x); }

#else

// The same on the host; see above for what each does.
inline void barrier() { emulation::barrier(); }
inline bool any(bool is_true) { return emulation::any(is_true); }
inline float shuffle_xor(float value, int mask) {
    return emulation::bits_float(emulation::shuffle_xor(emulation::float_bits(value), mask));
}
inline uint32_t shuffle_xor(uint32_t value, int mask) {
    return emulation::shuffle_xor(value, mask);
}
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::mma(d, a, b0, b1);
}
inline void load_matrices(uint32_t (&d)[4], const void* shared) {
    emulation::load_matrices(d, shared, false);
}
inline void load_matrices_transposed(uint32_t (&d)[4], const void* shared) {
    emulation::load_matrices(d, shared, true);
}
inline void copy_async(void* shared, const void* global, int bytes) {
    emulation::copy_async(shared, global, bytes);
}
template <int Offset>
void copy_async_at(uint8_t* shared, const uint8_t* global) {
    copy_async(shared + Offset, global + Offset, 16);
}
inline void prefetch(const void*) {}
inline void begin_overlapped() {}
inline void commit_copies() { emulation::commit_copies(); }
inline void wait_copies(int pending) { emulation::wait_copies(pending); }

inline uint32_t float_bits(float x) { return emulation::float_bits(x); }
inline float bits_float(uint32_t bits) { return emulation::bits_float(bits); }
inline float half_value(uint16_t bits) { return emulation::half_value(bits); }
inline uint16_t half_bits(float x) { return emulation::half_bits(x); }
inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    return emulation::permute(a, b, selector);
}
inline uint32_t pack_half2(float low, float high) {
    return half_bits(low) | static_cast<uint32_t>(half_bits(high)) << 16;
}
inline uint32_t half2_sub(uint32_t a, uint32_t b) {
    return emulation::by_halves(a, b, [](float x, float y) { return x - y; });
}
inline uint32_t half2_mul(uint32_t a, uint32_t b) {
    return emulation::by_halves(a, b, [](float x, float y) { return x * y; });
}
inline float larger(float a, float b) { return a > b ? a : b; }
inline float exp2_fast(float x) { return emulation::exp2_flushed(x); }
inline float add_exact(float a, float b) { return a + b; }
inline float sub_exact(float a, float b) { return a - b; }
inline float mul_exact(float a, float b) { return a * b; }
inline float div_exact(float a, float b) { return a / b; }
inline float sqrt_exact(float x) { return emulation::square_root(x); }
inline float round_to_even(float x) { return emulation::round_to_even(x); }

#endif

template <class T>
MLA_DEVICE T load(const void* at) {
#ifndef __CUDACC__
    emulation::touch(at, sizeof(T), alignof(T));
#endif
    return *static_cast<const T*>(at);
}
template <class T>
MLA_DEVICE void store(void* at, T value) {
#ifndef __CUDACC__
    emulation::touch(at, sizeof(T), alignof(T));
#endif
    *static_cast<T*>(at) = value;
}

MLA_DEVICE Floats2 unpack_half2(uint32_t pair) {
    return {half_value(static_cast<uint16_t>(pair)), half_value(static_cast<uint16_t>(pair >> 16))};
}
MLA_DEVICE float half2_sum(uint32_t pair) {
    const Floats2 x = unpack_half2(pair);
    return x.x + x.y;
}

MLA_DEVICE float max_of(float a, float b) { return a > b ? a : b; }
MLA_DEVICE float min_of(float a, float b) { return a < b ? a : b; }
MLA_DEVICE int min_of(int a, int b) { return a < b ? a : b; }
MLA_DEVICE int max_of(int a, int b) { return a > b ? a : b; }

// Beyond half's range a number saturates. A query's scores are then so far apart that
// only their order counts.
MLA_DEVICE float in_range(float x) { return max_of(min_of(x, 65504.0f), -65504.0f); }

}  // namespace mla::cuda
