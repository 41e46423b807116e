// AVX-512 with VNNI, without BF16: Cascade Lake, Ice Lake.
#include "cpu/simd/table.h"
#include "cpu/simd/vector_avx512.h"

namespace mla::cpu {

const KernelTable* avx512_kernels() {
    static const KernelTable table =
        make_table<Avx512, QuantDot<Avx512>, MatFp32<Avx512>>({180, 60, 60, 60});
    return &table;
}

}  // namespace mla::cpu
