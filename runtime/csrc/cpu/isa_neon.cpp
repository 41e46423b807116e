// NEON: compiled once for every aarch64 and once with the dot-product extension.
#include "cpu/simd/table.h"
#include "cpu/simd/vector_neon.h"

namespace mla::cpu {

#if defined(__ARM_FEATURE_DOTPROD)
const KernelTable* neon_dotprod_kernels() {
    static const KernelTable table =
        make_table<Neon, QuantDot<Neon>, MatFp32<Neon>>({60, 15, 15, 15});
#else
const KernelTable* neon_kernels() {
    static const KernelTable table =
        make_table<Neon, QuantDot<Neon>, MatFp32<Neon>>({20, 15, 15, 15});
#endif
    return &table;
}

}  // namespace mla::cpu
