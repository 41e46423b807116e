// What the kernels are given: one plain struct, passed by value, whose pointers are the device's.
//
// Notation: B sequences, S tokens of each in this call, H heads, N = qk_nope_head_dim,
// R = qk_rope_head_dim, D = kv_lora_rank, V = v_head_dim, M pages a sequence. Long calls run in
// rounds of S' tokens of every sequence; a row is one (token, head) of a round: s' * H + h. The
// expanded mode goes over the cache in chunks of C tokens.
#pragma once

#include <cstdint>

namespace mla::cuda {

constexpr int kPageTokens = 64;
constexpr int kMaxParts = 5;
constexpr int kGroup = 64;      // latent channels that share a scale
constexpr int kRopeGroup = 16;  // rope channels that share a scale

enum class CacheFormat : int { kInt4 = 0, kInt8 = 1, kFp16 = 2 };
enum class Element : int { kFp32 = 0, kFp16 = 1, kBf16 = 2 };

// Numbers whose type is known at run time. Strides count elements.
struct Reals {
    void* data;
    Element type;
    int64_t stride;  // from a token to the next; sequence b starts S tokens after b - 1
};

struct Params {
    int batch;        // B
    int steps;        // S
    int first_step;   // of the round
    int round_steps;  // S'
    int table_pages;  // M
    int heads, nope, rank, rope, v;
    int row_tiles;       // of 16 rows, T: all rows of a round, and some that nobody asked for
    int splits;          // into how many runs of tiles a sequence is cut
    int stages;          // tiles in shared memory at once
    float query_scale;   // softmax_scale * log2(e): scores are in units of log2
    float norm_epsilon;  // negative: no norm

    Reals q;               // [B, S, H * (N + R)]: a head's q_nope, then its q_pe, not rotated
    Reals kv;              // [B, S, D + R]: latent before its norm, then k_pe, not rotated
    Reals output;          // [B, S, H * V]
    const float* cos;      // [B, S, R / 2]
    const float* sin;      // [B, S, R / 2]
    const uint16_t* w_uk;  // [H, N, D] fp16
    const uint16_t* w_uv;  // [H, D, V] fp16

    const int64_t* block_table;   // [B, M]
    const int64_t* past_lengths;  // [B]
    const int64_t* new_lengths;   // [B]

    uint8_t* parts[kMaxParts];  // each [pages, page of the part]; cache-record.md
    int64_t pages;

    // Whether latents are codes, and scales and zeros applied to sums (formats.h).
    bool folded;
    // Whether a kernel may be launched while the one before it runs: it waits on the device.
    bool overlaps;

    // The workspace of a round. fragments.h has the order of queries and partial_o.
    uint32_t* queries;  // [B, T, (D + R) / 16, 32, 4]: fp16, q_nope w_uk and q_pe rotated
    float* partial_o;   // [B, T, splits, 16, D]: sum_t 2^(score - max) c_t over a run of tiles
    float* partial;     // [B, S' * H, splits, 2]: max, sum_t 2^(score - max)
    float* latents;     // [B, S' * H, D]: merged

    // The workspace of a prompt in the expanded mode (expanded.h): C tokens of each sequence at a
    // time, those from first_token on.
    int first_token, chunk_tokens;
    uint16_t* c_kv;    // [B, C, D] fp16: decoded
    uint16_t* k_pe;    // [B, C, R] fp16
    uint16_t* keys;    // [B, H, C, N] fp16: c_kv w_uk^T
    uint16_t* values;  // [B, H, C, V] fp16: c_kv w_uv
    float* running;    // of each thread, what it has summed up over earlier chunks

    // Set to a Problem by kernels that cannot do what they are asked; may be null.
    int32_t* problem;
};

// Values of Params::problem: lengths and pages are only known to the device.
enum Problem : int32_t {
    kNoProblem = 0,
    kBadLength = 1,  // negative, new > S, or past + new beyond the block table
    kBadPage = 2,    // a page that the arena does not have
};

}  // namespace mla::cuda
