// What one instruction set provides: a table of functions over plain task structs. The driver
// (latent_attention.cpp) cuts a call into tasks, the kernels (portable.cpp, isa_*.cpp) run them.
//
// Scores are kept in units of log2: q_latent and q_pe arrive multiplied by
// softmax_scale * log2(e), and p = 2^(score - max).
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/latent_attention.h"
#include "cpu/record.h"

namespace mla::cpu {

// Encodes `tokens` neighbouring tokens of one sequence.
struct EncodeTask {
    const Record* record;
    const float* kv;  // [tokens, kv_stride]: latent [D], k_pe [R]
    int64_t kv_stride;
    const float* cos;  // [tokens, R / 2]
    const float* sin;  // [tokens, R / 2]
    int tokens;
    const int64_t* pages;  // the sequence's row of the block table
    int64_t position;      // of the first token in its sequence
    float epsilon;         // negative: no norm
};

// out[r] = x[r] w, w [k, n]. How w lies in memory:
enum class WeightLayout : int {
    kRowsFp32,   // [k][stride]
    kRowsBf16,   // [k][stride]
    kPairsBf16,  // [k / 2][stride][2]: rows 2 i and 2 i + 1 interleaved, as the bf16 dot wants them
    kRowsInt8,   // [k][stride], times scale [n]
};

constexpr int kMatmulRows = 4;

struct MatmulTask {
    int rows;                     // 1 to kMatmulRows
    int k, n;                     // n a multiple of 16; k even for kPairsBf16
    const float* x[kMatmulRows];  // [k] each
    const void* w;
    WeightLayout layout;
    int64_t stride;
    const float* scale;       // [n], kRowsInt8 only
    float* out[kMatmulRows];  // [n] each
};

// Rows of absorbed queries of one sequence against a run of its pages.
struct AttendTask {
    const Record* record;
    const int64_t* pages;  // the sequence's row of the block table
    int64_t page_begin, page_end;
    int64_t length;  // tokens of the sequence, the new ones included; slots beyond are not read
    int rows;
    const float* q_latent;   // [rows, D]
    const float* q_pe;       // [rows, R]
    const int64_t* visible;  // [rows] tokens of the sequence that a row sees; >= 1
    bool exact;              // no quantised queries or probabilities
    uint8_t* scratch;        // 64-byte aligned, attend_scratch() bytes
    // Partial results over these pages: sum = sum_t 2^(score - max), o = sum_t 2^(score - max) c.
    // A row that sees none of the pages gets max = kNothingSeen and sum = o = 0.
    float* max;  // [rows]
    float* sum;  // [rows]
    float* o;    // [rows, D]
};

constexpr float kNothingSeen = -1e30f;

// Expanded mode works on chunks of a sequence's tokens, decoded once for all heads.
constexpr int kChunkTokens = 512;
constexpr int kChunkStride = kChunkTokens + 16;  // no power of two, or columns share sets of the L1

// Elements are bf16 (pair = 2) or fp32 (pair = 1). Columns are [k / pair][kChunkStride][pair].
struct ChunkTask {
    const Record* record;
    const int64_t* pages;
    int64_t page;     // in the sequence: this task decodes one page
    int64_t length;   // tokens beyond are decoded as zeros
    int rank_padded;  // D rounded up to 32
    int rope_padded;  // R rounded up to 32
    bool bf16;
    void* c_rows;      // [64, rank_padded]: this page's rows
    void* c_columns;   // [rank_padded / pair][kChunkStride][pair], already at this page's token
    void* pe_columns;  // [rope_padded / pair][kChunkStride][pair], already at this page's token
    uint8_t* scratch;  // chunk_scratch() bytes
};

// One head's queries of one sequence against one decoded chunk.
struct HeadTask {
    AttentionDims dims;
    int nope_padded, rank_padded, rope_padded, v_padded;  // to 16, 32, 32, 16
    bool bf16;
    const void* w_uk;  // [nope_padded, rank_padded] elements
    const void* w_uv;  // [rank_padded / pair][v_padded][pair]
    const void* c_rows;
    const void* c_columns;
    const void* pe_columns;
    int64_t chunk_begin;  // the sequence's token that chunk token 0 is
    int chunk_tokens;     // multiple of 64
    int64_t past;         // query s sees tokens 0 to past + s
    int queries;
    const void* q;     // [queries rounded up to 16, nope_padded + rope_padded] elements, scaled
    float* max;        // [queries] running
    float* sum;        // [queries] running
    float* o;          // [queries rounded up to 16, v_padded] running
    uint8_t* scratch;  // head_scratch() bytes
};

struct KernelTable {
    bool has_bf16;  // expanded mode in bf16; else fp32
    // Multiply-adds a nanosecond and core, measured roughly: what choose_mode() weighs.
    float absorbed_rate, absorbed_exact_rate, expanded_rate, expanded_exact_rate;
    void (*encode)(const EncodeTask&);
    void (*matmul)(const MatmulTask&);
    size_t (*attend_scratch)(const Record&, int rows);
    void (*attend)(const AttendTask&);
    size_t (*chunk_scratch)(const Record&);
    void (*decode_chunk)(const ChunkTask&);
    size_t (*head_scratch)(const HeadTask&);  // of the sizes only
    void (*attend_head)(const HeadTask&);
};

// The table of a resolved instruction set; null where this build has none.
const KernelTable* kernels_of(Isa isa);

const KernelTable* portable_kernels();
const KernelTable* avx2_kernels();
const KernelTable* avx2_vnni_kernels();
const KernelTable* avx512_kernels();
const KernelTable* avx512_bf16_kernels();
const KernelTable* amx_kernels();
const KernelTable* neon_kernels();
const KernelTable* neon_dotprod_kernels();
const KernelTable* neon_i8mm_kernels();

}  // namespace mla::cpu
