// Which instruction set runs: names, MLA_CPU_ISA, what the CPU and this build have.
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/error.h"
#include "cpu/features.h"
#include "cpu/kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace mla::cpu {
namespace {

thread_local char error_text[512] = "";

constexpr const char* kNames[] = {"auto",        "portable", "avx2", "avx2_vnni",    "avx512_vnni",
                                  "avx512_bf16", "amx",      "neon", "neon_dotprod", "neon_i8mm"};
constexpr int kIsaCount = sizeof(kNames) / sizeof(kNames[0]);
constexpr const char* kNameList =
    "auto, portable, avx2, avx2_vnni, avx512_vnni, avx512_bf16, amx, neon, neon_dotprod, neon_i8mm";

// Linux gives a process the tile registers only when it asks.
bool tiles_granted() {
#if defined(__x86_64__) && defined(__linux__)
    static const bool granted = [] {
        constexpr long kRequestPermission = 0x1023, kTileData = 18;
        return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return granted;
#else
    return false;
#endif
}

bool works_here(Isa isa) {
    if (!kernels_of(isa)) return false;
    const Features& f = features();
    switch (isa) {
        case Isa::kPortable:
            return true;
        case Isa::kAvx2:
            return f.avx2;
        case Isa::kAvx2Vnni:
            return f.avx2 && f.avx_vnni;
        case Isa::kAvx512Vnni:
            return f.avx512_vnni;
        case Isa::kAvx512Bf16:
            return f.avx512_vnni && f.avx512_bf16;
        case Isa::kAmx:
            return f.avx512_vnni && f.avx512_bf16 && f.amx_int8 && f.amx_bf16 && tiles_granted();
        case Isa::kNeon:
            return f.neon;
        case Isa::kNeonDotprod:
            return f.neon && f.dotprod;
        case Isa::kNeonI8mm:
            return f.neon && f.dotprod && f.i8mm;
        default:
            return false;
    }
}

Isa fastest() {
    static const Isa found = [] {
        for (const Isa isa : {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512Vnni, Isa::kAvx2Vnni,
                              Isa::kAvx2, Isa::kNeonI8mm, Isa::kNeonDotprod, Isa::kNeon}) {
            if (isa == Isa::kAvx512Bf16 && !features().fast_bf16) continue;
            if (works_here(isa)) return isa;
        }
        return Isa::kPortable;
    }();
    return found;
}

}  // namespace

Status fail(Status status, const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(error_text, sizeof error_text, format, arguments);
    va_end(arguments);
    return status;
}

const char* last_error() { return error_text; }

const char* isa_name(Isa isa) {
    const int index = static_cast<int>(isa);
    return index >= 0 && index < kIsaCount ? kNames[index] : "unknown";
}

Status parse_isa(const char* name, Isa* isa) {
    if (!name || !isa) return fail(Status::kBadArgument, "parse_isa: a null pointer");
    for (int i = 0; i < kIsaCount; ++i) {
        if (std::strcmp(name, kNames[i]) != 0) continue;
        *isa = static_cast<Isa>(i);
        return Status::kOk;
    }
    return fail(Status::kUnknownIsa, "unknown instruction set '%.64s'; known: %s", name, kNameList);
}

Status resolve_isa(Isa isa, Isa* resolved) {
    if (!resolved) return fail(Status::kBadArgument, "resolve_isa: a null pointer");
    const char* origin = "";
    if (isa == Isa::kAuto) {
        const char* forced = std::getenv("MLA_CPU_ISA");
        if (forced && *forced) {
            const Status status = parse_isa(forced, &isa);
            if (status != Status::kOk)
                return fail(status, "MLA_CPU_ISA='%.64s' names no instruction set; known: %s",
                            forced, kNameList);
            origin = " (from MLA_CPU_ISA)";
        }
    }
    if (isa == Isa::kAuto) isa = fastest();
    if (!works_here(isa))
        return fail(Status::kUnavailableIsa,
                    "instruction set '%s'%s is not available on this CPU, operating system or "
                    "build; fastest available: %s",
                    isa_name(isa), origin, isa_name(fastest()));
    *resolved = isa;
    return Status::kOk;
}

const KernelTable* kernels_of(Isa isa) {
    switch (isa) {
        case Isa::kPortable:
            return portable_kernels();
#if defined(MLA_CPU_X86)
        case Isa::kAvx2:
            return avx2_kernels();
        case Isa::kAvx2Vnni:
            return avx2_vnni_kernels();
        case Isa::kAvx512Vnni:
            return avx512_kernels();
        case Isa::kAvx512Bf16:
            return avx512_bf16_kernels();
        case Isa::kAmx:
            return amx_kernels();
#elif defined(MLA_CPU_ARM)
        case Isa::kNeon:
            return neon_kernels();
        case Isa::kNeonDotprod:
            return neon_dotprod_kernels();
        case Isa::kNeonI8mm:
            return neon_i8mm_kernels();
#endif
        default:
            return nullptr;
    }
}

}  // namespace mla::cpu
