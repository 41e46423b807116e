// AMX int8 and bf16 tiles over AVX-512 VNNI and BF16: Sapphire Rapids and later.
#include "cpu/simd/amx_dot.h"
#include "cpu/simd/amx_mat.h"
#include "cpu/simd/table.h"

namespace mla::cpu {

const KernelTable* amx_kernels() {
    static const KernelTable table = make_table<Avx512, AmxDot, MatAmx>({260, 60, 400, 60});
    return &table;
}

}  // namespace mla::cpu
