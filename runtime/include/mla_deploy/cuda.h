/* Latent attention on NVIDIA GPUs: append new tokens to a paged cache, then attend to it.
 *
 * A launcher without a framework: device pointers, strides and a stream in, a status out. It is
 * libmla_deploy_cuda.so, and needs nothing but the CUDA runtime that is linked into it.
 *
 *     score = (w_uk_h^T q_nope_h) . c_kv + q_pe_h . k_pe,   o_h = w_uv_h^T sum_t p_t c_kv_t
 *
 * The Python reference is mla_deploy/ops/attention.py; the bytes of the cache are those of
 * docs/cache-record.md.
 *
 * - Calls on attention only enqueue work: they do not wait, allocate nothing, copy nothing to or
 *   from the host. Lengths and pages are read on the device, and grids follow from sizes alone, so
 *   a call may be captured into a CUDA graph and replayed as the sequences grow. Run a call of the
 *   same sizes before the capture: the driver may load a kernel when it is first launched, which a
 *   capture does not allow.
 * - The device is the current one of the calling thread. Calls on one workspace must be ordered.
 * - Unless a call returns MLA_CUDA_OK, mla_cuda_last_error() has the text, and
 *   MLA_CUDA_BAD_ARGUMENT and MLA_CUDA_UNSUPPORTED mean that nothing was enqueued.
 *
 * Notation: B sequences, S new tokens each (padded on the right), H heads, N = qk_nope_head_dim,
 * R = qk_rope_head_dim, D = kv_lora_rank, V = v_head_dim, M pages a sequence, 64 tokens a page.
 */
#ifndef MLA_DEPLOY_CUDA_H
#define MLA_DEPLOY_CUDA_H

#include <stddef.h>
#include <stdint.h>

#include "mla_deploy/runtime.h" /* MLA_API */

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mla_cuda_status {
    MLA_CUDA_OK = 0,
    MLA_CUDA_BAD_ARGUMENT = 1, /* a size, pointer or value that the call cannot work with */
    MLA_CUDA_UNSUPPORTED = 2,  /* this device cannot run what this library was built for */
    MLA_CUDA_FAILED = 3,       /* the CUDA runtime reports an error */
    MLA_CUDA_NO_MEMORY = 4     /* the device has not as much left */
} mla_cuda_status;

typedef enum mla_cuda_type {
    MLA_CUDA_FP32 = 0,
    MLA_CUDA_FP16 = 1,
    MLA_CUDA_BF16 = 2
} mla_cuda_type;

typedef enum mla_cuda_cache {
    MLA_CUDA_CACHE_INT4 = 0,
    MLA_CUDA_CACHE_INT8 = 1,
    MLA_CUDA_CACHE_FP16 = 2
} mla_cuda_cache;

/* Two orders of the same sums. Absorbed: queries and outputs go through w_uk and w_uv, keys and
 * values are the cache itself. Expanded: keys and values are made of the cache, a chunk at a time
 * in the workspace; fewer operations for long prompts, N + R and V at most 256. */
typedef enum mla_cuda_mode {
    MLA_CUDA_AUTO = 0, /* whichever takes fewer operations */
    MLA_CUDA_ABSORBED = 1,
    MLA_CUDA_EXPANDED = 2
} mla_cuda_mode;

/* Values of *problem: what only the device can find. Output of such sequences has no meaning. */
typedef enum mla_cuda_problem {
    MLA_CUDA_NO_PROBLEM = 0,
    MLA_CUDA_BAD_LENGTH = 1, /* negative, new > S, or past + new > 64 M */
    MLA_CUDA_BAD_PAGE = 2    /* the block table names a page that the arena does not have */
} mla_cuda_problem;

/* A tensor whose rows of a token start `stride` elements after those of the token before; 0: dense.
 * Sequence b starts S tokens after sequence b - 1. */
typedef struct mla_cuda_reals {
    void* data;
    mla_cuda_type type;
    int64_t stride;
} mla_cuda_reals;

typedef struct mla_cuda_attention {
    size_t size; /* sizeof(mla_cuda_attention) */

    int64_t batch;       /* B */
    int64_t steps;       /* S */
    int64_t table_pages; /* M */
    int32_t heads;       /* H, 1 to 128 */
    int32_t nope;        /* N, a multiple of 8 up to 1024 */
    int32_t rank;        /* D, 256 or 512 */
    int32_t rope;        /* R, a multiple of 16 up to 64 */
    int32_t v;           /* V, a multiple of 8 up to 1024 */

    mla_cuda_cache cache_format;
    mla_cuda_mode mode;
    int32_t
        splits; /* absorbed: runs of pages that a sequence is cut into; 0: as the device wants */

    mla_cuda_reals q;      /* [B, S, H * (N + R)]: a head's q_nope, then its q_pe, not rotated */
    mla_cuda_reals kv;     /* [B, S, D + R]: latent before its norm, then k_pe, not rotated */
    mla_cuda_reals output; /* [B, S, H * V]; rows of padded tokens are set to zero */
    const float* cos;      /* [B, S, R / 2]; pair i is channels 2 i and 2 i + 1 */
    const float* sin;      /* [B, S, R / 2] */
    const void* w_uk;      /* [H, N, D] fp16, 16-byte aligned */
    const void* w_uv;      /* [H, D, V] fp16, 16-byte aligned */

    const int64_t* block_table;  /* [B, M]; the first ceil((past + new) / 64) of a row are read */
    const int64_t* past_lengths; /* [B] tokens already in the cache */
    const int64_t* new_lengths;  /* [B] tokens of S that are real */

    void* cache[5]; /* the record's parts, each [pages, page of the part], 16-byte aligned */
    int64_t pages;  /* of the arena, 1 or more */

    float softmax_scale;
    float latent_norm_epsilon; /* of the RMSNorm (no gamma) on the latent; negative: no norm */

    void* workspace; /* 256-byte aligned; not read or written by append alone */
    size_t workspace_bytes;
    int32_t* problem; /* one int on the device, or null; only written where there is a problem */
} mla_cuda_attention;

/* One array of the cache record: [pages, page of the part]. */
typedef struct mla_cuda_part {
    int32_t element_bytes; /* 1: codes, 2: float16 */
    int64_t page_bytes;
} mla_cuda_part;

/* What the last call of this thread that did not return MLA_CUDA_OK has to say. Never null; valid
 * until the next call that fails in this thread. */
MLA_API const char* mla_cuda_last_error(void);

/* The architectures that this library holds, such as "sm_80 sm_90 compute_90". */
MLA_API const char* mla_cuda_targets(void);

/* MLA_CUDA_OK if the current device can run this library. */
MLA_API mla_cuda_status mla_cuda_check_device(void);

/* The workspace that a call of these sizes needs on the current device. Only sizes, cache_format,
 * mode and splits are read. */
MLA_API mla_cuda_status mla_cuda_workspace_bytes(const mla_cuda_attention* attention,
                                                 size_t* bytes);

/* A workspace that is enough for calls of these sizes and smaller ones on every device, with this
 * mode and splits left at 0. Needs no device. */
MLA_API mla_cuda_status mla_cuda_workspace_bound(const mla_cuda_attention* attention,
                                                 size_t* bytes);

/* The record of a call's cache_format, rank and rope: its parts in order, at most 5. Needs no
 * device. */
MLA_API mla_cuda_status mla_cuda_cache_parts(const mla_cuda_attention* attention,
                                             mla_cuda_part parts[5], int32_t* count);

/* Encodes the new tokens into the cache. q, output, weights, softmax_scale and the workspace are
 * not looked at. */
MLA_API mla_cuda_status mla_cuda_latent_append(const mla_cuda_attention* attention, void* stream);

/* Append, then the attention of each new token over all tokens up to itself. */
MLA_API mla_cuda_status mla_cuda_latent_attention(const mla_cuda_attention* attention,
                                                  void* stream);

/* ---- memory of the current device, for a cache ---------------------------------------------- */

/* Zeroed memory, aligned to 256 bytes. Waits. Also: MLA_CUDA_NO_MEMORY. */
MLA_API mla_cuda_status mla_cuda_allocate(void** memory, size_t bytes);

/* Waits for work that uses it. Null is allowed. */
MLA_API mla_cuda_status mla_cuda_release(void* memory);

/* Sets bytes to zero, and copies on the device. They only enqueue. */
MLA_API mla_cuda_status mla_cuda_clear(void* memory, size_t bytes, void* stream);
MLA_API mla_cuda_status mla_cuda_copy(void* to, const void* from, size_t bytes, void* stream);

/* From and to the host; done when they return. They do not wait for work on other streams. */
MLA_API mla_cuda_status mla_cuda_read(void* host, const void* from, size_t bytes);
MLA_API mla_cuda_status mla_cuda_write(void* to, const void* host, size_t bytes);

/* Waits until all that was enqueued on the stream is done. */
MLA_API mla_cuda_status mla_cuda_wait(void* stream);

#ifdef __cplusplus
}
#endif

#endif
