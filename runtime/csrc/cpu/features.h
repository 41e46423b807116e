// Which instruction sets this CPU has, asked of the CPU itself.
#pragma once

#include <vector>

namespace mla::cpu {

// The instruction sets that a kernel can be chosen by. A field is true only if the operating
// system also saves the registers concerned.
struct Features {
    bool avx2 = false;  // with fma and f16c
    bool avx_vnni = false;
    bool avx512f = false;  // with bw, dq and vl, which Knights Landing lacks
    bool avx512_vnni = false;
    bool avx512_bf16 = false;
    bool fast_bf16 = false;  // vdpbf16ps is as quick as a fused multiply-add: AMD's
    bool amx_int8 = false;   // on Linux a process must also ask for the tile state (arch_prctl)
    bool amx_bf16 = false;
    bool neon = false;
    bool dotprod = false;
    bool i8mm = false;
};

// Detected once; safe to call from any thread.
const Features& features();

// The names of the instruction sets that are there, in the order of the struct.
std::vector<const char*> feature_names();

}  // namespace mla::cpu
