#include "cpu/simd/i8mm_dot.h"
#include "cpu/simd/table.h"

namespace mla::cpu {

const KernelTable* neon_i8mm_kernels() {
    // The absorbed rate is a guess from sdot's: nobody has measured it yet.
    static const KernelTable table =
        make_table<NeonI8mm, I8mmDot, MatFp32<NeonI8mm>>({90, 15, 15, 15});
    return &table;
}

}  // namespace mla::cpu
