// AVX-512 with VNNI, and with a vdpbf16ps as fast as a fused multiply-add: Zen 4, Zen 5. The
// expanded mode computes in bf16.
#include "cpu/simd/bf16_mat.h"
#include "cpu/simd/table.h"

namespace mla::cpu {

const KernelTable* avx512_bf16_kernels() {
    static const KernelTable table =
        make_table<Avx512, QuantDot<Avx512>, MatBf16>({245, 115, 220, 115});
    return &table;
}

}  // namespace mla::cpu
