// AVX-512 with VNNI: Cascade Lake, Ice Lake. The expanded mode stays in fp32, also where there is
// BF16 that is slow: on Sapphire Rapids vdpbf16ps takes four times as long as a fused multiply-add.
#include "cpu/simd/table.h"
#include "cpu/simd/vector_avx512.h"

namespace mla::cpu {

const KernelTable* avx512_kernels() {
    static const KernelTable table =
        make_table<Avx512, QuantDot<Avx512>, MatFp32<Avx512>>({160, 60, 75, 60});
    return &table;
}

}  // namespace mla::cpu
