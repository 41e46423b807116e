// AVX-512 with VNNI and BF16: Cooper Lake, Zen 4, and Sapphire Rapids without its tiles.
#include "cpu/simd/mat_bf16.h"
#include "cpu/simd/table.h"
#include "cpu/simd/vector_avx512.h"

namespace mla::cpu {

const KernelTable* avx512_bf16_kernels() {
    static const KernelTable table =
        make_table<Avx512, QuantDot<Avx512>, MatBf16>({180, 60, 110, 60});
    return &table;
}

}  // namespace mla::cpu
