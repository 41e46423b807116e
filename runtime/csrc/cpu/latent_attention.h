// Latent attention on the CPU: append new tokens to a paged cache, then attend to it.
//
//     absorbed:  score = (w_uk_h^T q_nope_h) . c + q_pe_h . k_pe,  o_h = w_uv_h^T sum_t p_t c_t
//     expanded:  k_h = w_uk_h c, v_h = w_uv_h^T c a head, then ordinary attention (long prompts)
//
// Plain structs in, a status out; no exception, no framework, no thread of its own. The Python
// reference is mla_deploy/ops/attention.py, the reference of the bytes quant/latent_cache.py.
//
// Notation: B sequences, S new tokens each (padded on the right), H heads, N = qk_nope_head_dim,
// R = qk_rope_head_dim, D = kv_lora_rank, V = v_head_dim, M pages a sequence, 64 tokens a page.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mla::cpu {

constexpr int kPageTokens = 64;
constexpr int kMaxParts = 5;

// Anything but kOk comes with a text in last_error().
enum class Status : int {
    kOk = 0,
    kBadArgument = 1,     // a size, pointer or value that the call cannot work with
    kOutOfMemory = 2,     // workspace or weights could not be allocated
    kUnknownIsa = 3,      // MLA_CPU_ISA names no instruction set
    kUnavailableIsa = 4,  // a known one that this CPU, system or build lacks
};

// What went wrong in the last call of this thread that did not return kOk. Never null; valid until
// the thread's next failing call.
const char* last_error();

// ---- instruction sets -----------------------------------------------------------------------

enum class Isa : int {
    kAuto = 0,    // MLA_CPU_ISA if set, else the fastest that works here
    kPortable,    // scalar fp32 code without quantised queries: the oracle of the others
    kAvx2,        // with fma, f16c
    kAvx2Vnni,    // and the 256-bit vpdpbusd of AVX-VNNI
    kAvx512Vnni,  // f, bw, dq, vl and vnni
    kAvx512Bf16,  // avx512_vnni, prompts in bf16
    kAmx,         // avx512_vnni with int8 and bf16 tiles
    kNeon,        // any aarch64
    kNeonDotprod,
    kNeonI8mm,  // with dotprod
};

// "auto", "portable", "avx2", "avx2_vnni", "avx512_vnni", "avx512_bf16", "amx", "neon",
// "neon_dotprod", "neon_i8mm".
const char* isa_name(Isa isa);

// The inverse; kUnknownIsa lists the names. `name` is read during the call only.
Status parse_isa(const char* name, Isa* isa);

// What `isa` stands for here: resolves kAuto, checks everything else. Thread-safe.
Status resolve_isa(Isa isa, Isa* resolved);

// ---- the cache ------------------------------------------------------------------------------
//
// One token leaves these parts, in this order. g = largest power of two <= 64 that divides D,
// r = largest power of two <= 16 that divides R. Bytes at D = 512, R = 64:
//
//   int4   codes       uint8 BLOCKED  D / 2   256   byte 4 k + j: channel 8 k + j in the low
//   nibble,
//                                                   8 k + 4 + j in the high one (0 <= j < 4)
//          scale       fp16  COLUMNS  D / g    16   c = scale * code + zero
//          zero        fp16  COLUMNS  D / g    16
//          k_pe_codes  int8  BLOCKED  R        64   k_pe = k_pe_scale * k_pe_code
//          k_pe_scale  fp16  COLUMNS  R / r     8   total 360
//   int8   codes       int8  BLOCKED  D       512   c = scale * code
//          scale       fp16  COLUMNS  D / g    16
//          k_pe_codes, k_pe_scale as above     72   total 600
//   fp16   c_kv, k_pe  fp16  ROWS     D, R   1152
//   fp32   c_kv, k_pe  fp32  ROWS     D, R   2304
//
// Layout of a page (64 tokens) of a part with `width` values a token:
//   BLOCKED  [4][width / 4][16][4]   16 tokens side by side, 4 values each: one 64-byte line
//   COLUMNS  [width][64]
//   ROWS     [64][width]
enum class CacheFormat : int { kInt4 = 0, kInt8 = 1, kFp16 = 2, kFp32 = 3 };

struct CacheArena {
    CacheFormat format = CacheFormat::kInt4;
    int64_t pages = 0;
    // Part p: [pages, page of that part], contiguous, in the order above; written in place.
    // 64-byte alignment is best, 2-byte alignment is enough. Unused parts are null.
    void* parts[kMaxParts] = {};
};

struct PartInfo {
    const char* name = "";
    int element_bytes = 0;
    int width = 0;           // values per token
    int64_t page_bytes = 0;  // element_bytes * width * 64
};

// Fills `parts` [kMaxParts]; `count` of them exist. kBadArgument: the format cannot hold the sizes.
Status cache_parts(CacheFormat format, int rank, int rope, PartInfo* parts, int* count);

// ---- the weights ----------------------------------------------------------------------------

enum class ElementType : int { kFp32 = 0, kFp16 = 1, kBf16 = 2 };

// How the kernels hold w_uk and w_uv.
//   kFp32  exact: nothing is rounded below fp32 anywhere, queries and probabilities included
//   kBf16  fast
//   kInt8  fast, half the bytes: symmetric, a scale per head and output channel
enum class WeightPrecision : int { kFp32 = 0, kBf16 = 1, kInt8 = 2 };

struct AttentionDims {
    int heads = 0;  // H, 1 to 128
    int nope = 0;   // N, 1 to 1024
    int rank = 0;   // D, a multiple of 16 up to 1024
    int rope = 0;   // R, a multiple of 4, 4 to 128
    int v = 0;      // V, 1 to 1024
};

struct WeightsDesc {
    AttentionDims dims;
    ElementType type = ElementType::kFp32;
    const void* w_uk = nullptr;  // [H, N, D], contiguous
    const void* w_uv = nullptr;  // [H, D, V], contiguous
    WeightPrecision precision = WeightPrecision::kBf16;
};

// Opaque, immutable once made: share it between threads and calls. Independent of the ISA.
struct PreparedWeights;

// Copies; the arrays may go afterwards. `weights` is to be freed with free_weights.
Status prepare_weights(const WeightsDesc& desc, PreparedWeights** weights);
void free_weights(PreparedWeights* weights);  // null is fine
size_t weights_bytes(const PreparedWeights* weights);

// ---- the call -------------------------------------------------------------------------------

// Runs task(argument, i) once for each 0 <= i < count, in any order, on any threads, and returns
// when all are done. A task never throws and never calls back into `run`.
struct ParallelFor {
    void* context = nullptr;
    // How many tasks can really run at once; the work is cut by it.
    int threads = 1;
    // Null: the tasks run one after the other on the calling thread.
    void (*run)(void* context, int64_t count, void (*task)(void* argument, int64_t index),
                void* argument) = nullptr;
};

// Memory between calls. Grows to the largest call seen and then stays: no allocation in steady
// state. One call at a time may use it.
struct Workspace;
Workspace* create_workspace();  // null: out of memory
void free_workspace(Workspace* workspace);
size_t workspace_bytes(const Workspace* workspace);

// kAuto weighs the multiply-adds of both for each sequence.
enum class AttentionMode : int { kAuto = 0, kAbsorbed = 1, kExpanded = 2 };

struct LatentAttentionParams {
    int64_t batch = 0;        // B
    int64_t steps = 0;        // S
    int64_t table_pages = 0;  // M

    // Rows of a token start `*_stride` floats after those of the token before; 0: dense.
    // Sequence b starts S tokens after sequence b - 1.
    const float* q = nullptr;  // [B, S, H * (N + R)]: a head's q_nope, then its q_pe, not rotated
    int64_t q_stride = 0;
    const float* kv = nullptr;  // [B, S, D + R]: latent before its norm, then k_pe, not rotated
    int64_t kv_stride = 0;
    const float* cos = nullptr;  // [B, S, R / 2], dense; pair i is channels 2 i and 2 i + 1
    const float* sin = nullptr;  // [B, S, R / 2], dense
    float* output = nullptr;     // [B, S, H * V]; rows of padded tokens are set to zero
    int64_t output_stride = 0;

    const PreparedWeights* weights = nullptr;
    CacheArena cache;
    // [B, M] pages of the arena; the first ceil((past + new) / 64) of a row are read. Pages that
    // new tokens fall into must belong to one sequence alone; others may be shared.
    const int64_t* block_table = nullptr;
    const int64_t* past_lengths = nullptr;  // [B] tokens already in the cache
    const int64_t* new_lengths =
        nullptr;  // [B] tokens of S that are real; padded ones write nothing

    float softmax_scale = 0;         // multiplies the scores
    float latent_norm_epsilon = -1;  // of the RMSNorm (no gamma) on the latent; negative: no norm
    AttentionMode mode = AttentionMode::kAuto;
    Isa isa = Isa::kAuto;
    ParallelFor parallel;
    Workspace* workspace = nullptr;  // required
};

// Encodes the new tokens into the cache, then writes the attention of each of them over all tokens
// up to itself. On kBadArgument, kUnknownIsa and kUnavailableIsa nothing has been touched.
Status latent_attention(const LatentAttentionParams& params);

// The first half alone: cache only; q, output and softmax_scale are not read.
Status latent_append(const LatentAttentionParams& params);

// The mode that latent_attention would take for one sequence; kAuto resolved, others returned.
AttentionMode choose_mode(const AttentionDims& dims, Isa resolved, bool exact, int64_t past,
                          int64_t fresh, AttentionMode asked);

}  // namespace mla::cpu
