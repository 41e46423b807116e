#include "features.h"

#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace mla::cpu {
namespace {

#if defined(__x86_64__) || defined(__i386__)

struct Registers {
    uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
    Registers r;
    // Leaves all registers at zero, that is every bit absent, if the leaf is not there.
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
    return r;
}

// XCR0: the register states that the operating system saves on a task switch.
uint64_t saved_states() {
    uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (static_cast<uint64_t>(high) << 32) | low;
}

constexpr uint32_t kAmd = 0x444d4163;  // the last letters of AuthenticAMD

constexpr bool bit(uint32_t reg, int n) { return ((reg >> n) & 1u) != 0; }

Features detect() {
    Features f;
    const Registers leaf1 = cpuid(1, 0);
    const bool osxsave = bit(leaf1.ecx, 27);  // without it xgetbv is an illegal instruction
    if (!osxsave) return f;

    constexpr uint64_t kAvxStates = 0x6;         // xmm, ymm
    constexpr uint64_t kAvx512States = 0xe6;     // and opmask, upper zmm, high zmm
    constexpr uint64_t kTileStates = 0x3 << 17;  // tile configuration, tile data
    const uint64_t states = saved_states();
    const bool avx_saved = (states & kAvxStates) == kAvxStates;
    const bool avx512_saved = (states & kAvx512States) == kAvx512States;
    const bool tiles_saved = (states & kTileStates) == kTileStates;

    const Registers leaf7 = cpuid(7, 0);
    const Registers leaf7_1 = leaf7.eax >= 1 ? cpuid(7, 1) : Registers{};

    const bool fma = bit(leaf1.ecx, 12), f16c = bit(leaf1.ecx, 29);
    f.avx2 = avx_saved && bit(leaf7.ebx, 5) && fma && f16c;
    f.avx_vnni = f.avx2 && bit(leaf7_1.eax, 4);

    const bool dq = bit(leaf7.ebx, 17), bw = bit(leaf7.ebx, 30), vl = bit(leaf7.ebx, 31);
    f.avx512f = avx512_saved && bit(leaf7.ebx, 16) && dq && bw && vl;
    f.avx512_vnni = f.avx512f && bit(leaf7.ecx, 11);
    f.avx512_bf16 = f.avx512f && bit(leaf7_1.eax, 5);
    f.fast_bf16 = f.avx512_bf16 && cpuid(0, 0).ecx == kAmd;

    const bool tiles = tiles_saved && bit(leaf7.edx, 24);
    f.amx_int8 = tiles && bit(leaf7.edx, 25);
    f.amx_bf16 = tiles && bit(leaf7.edx, 22);
    return f;
}

#elif defined(__aarch64__) && defined(__linux__)

Features detect() {
    const unsigned long hwcap = getauxval(AT_HWCAP);
    const unsigned long hwcap2 = getauxval(AT_HWCAP2);
    Features f;
    f.neon = (hwcap & HWCAP_ASIMD) != 0;
    f.dotprod = (hwcap & HWCAP_ASIMDDP) != 0;
    f.i8mm = (hwcap2 & HWCAP2_I8MM) != 0;
    return f;
}

#else

Features detect() {
    Features f;
#if defined(__aarch64__)
    f.neon = true;  // part of the base architecture; the rest has no portable question
#endif
    return f;
}

#endif

}  // namespace

const Features& features() {
    static const Features found = detect();
    return found;
}

std::vector<const char*> feature_names() {
    const Features& f = features();
    std::vector<const char*> names;
    const auto add = [&names](bool present, const char* name) {
        if (present) names.push_back(name);
    };
    add(f.avx2, "avx2");
    add(f.avx_vnni, "avx_vnni");
    add(f.avx512f, "avx512f");
    add(f.avx512_vnni, "avx512_vnni");
    add(f.avx512_bf16, "avx512_bf16");
    add(f.amx_int8, "amx_int8");
    add(f.amx_bf16, "amx_bf16");
    add(f.neon, "neon");
    add(f.dotprod, "dotprod");
    add(f.i8mm, "i8mm");
    return names;
}

}  // namespace mla::cpu
