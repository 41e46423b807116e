// AVX2 with FMA and F16C: compiled once as it is and once with AVX-VNNI.
#include "cpu/simd/table.h"
#include "cpu/simd/vector_avx2.h"

namespace mla::cpu {

#if defined(__AVXVNNI__)
const KernelTable* avx2_vnni_kernels() {
    static const KernelTable table =
        make_table<Avx2, QuantDot<Avx2>, MatFp32<Avx2>>({94, 35, 40, 40});
#else
const KernelTable* avx2_kernels() {
    static const KernelTable table =
        make_table<Avx2, QuantDot<Avx2>, MatFp32<Avx2>>({70, 35, 40, 40});
#endif
    return &table;
}

}  // namespace mla::cpu
