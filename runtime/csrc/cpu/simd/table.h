// One instruction set's table from its vectors X, its dots and its matrix product.
#pragma once

#include "cpu/simd/attend.h"
#include "cpu/simd/encode.h"
#include "cpu/simd/expanded.h"

namespace mla::cpu {
namespace {

struct Rates {
    float absorbed, absorbed_exact, expanded, expanded_exact;
};

template <class X, class Dot, class Mat>
constexpr KernelTable make_table(Rates rates) {
    KernelTable table = {};
    table.has_bf16 = Mat::kPair == 2;
    table.absorbed_rate = rates.absorbed;
    table.absorbed_exact_rate = rates.absorbed_exact;
    table.expanded_rate = rates.expanded;
    table.expanded_exact_rate = rates.expanded_exact;
    table.encode = Encoder<X>::encode;
    table.matmul = Matmul<X>::run;
    table.attend_scratch = Attend<X, Dot>::scratch;
    table.attend = Attend<X, Dot>::run;
    table.chunk_scratch = ExpandedEntry<X, Mat>::chunk_scratch;
    table.decode_chunk = ExpandedEntry<X, Mat>::decode;
    table.head_scratch = ExpandedEntry<X, Mat>::head_scratch;
    table.attend_head = ExpandedEntry<X, Mat>::attend;
    return table;
}

}  // namespace
}  // namespace mla::cpu
