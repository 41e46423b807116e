/* mla-deploy's engine for programs: the C ABI.
 *
 * Token ids in, token ids out; text.h makes ids of text and text of ids. examples/cpp/minimal.cpp
 * is a whole program, docs/embedding.md tells the story, and runtime.hpp wraps all this for C++.
 *
 * Rules that hold for every function:
 *
 * - Errors. A function that can fail returns mla_status. If that is not MLA_OK, mla_last_error()
 *   has the text, nothing was written to the outputs unless said otherwise, and every object is as
 *   it was before the call and goes on working.
 * - Handles. Engines, sessions, samplers and cancellations are opaque handles, never dereferenced
 *   and never used twice: a null handle, one that was closed, or one of another kind gives
 *   MLA_INVALID_HANDLE. Handles may be closed in any order: a session keeps what it needs of its
 *   engine, and a call that is running on a handle in another thread ends first.
 * - Threads. Every function may be called from any thread at any time. The graph of an engine runs
 *   one step at a time; callers are served in the order in which they came. Threads that share one
 *   session are kept apart, but the order of what they do is theirs to arrange.
 * - Memory. What a caller passes stays the caller's, and is read or written during the call only.
 *   Nothing that the library allocated has to be freed, except by closing handles.
 * - Structs begin with their size, set by the MLA_..._INIT initializers. A struct larger than the
 *   library knows (a program built with newer headers) is accepted if the part beyond is zero; an
 *   output struct is filled up to the smaller size, and zero beyond. One of older headers is
 *   accepted where fields were added since, which count as zero then.
 */
#ifndef MLA_DEPLOY_RUNTIME_H
#define MLA_DEPLOY_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define MLA_API __attribute__((visibility("default")))
#else
#define MLA_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised when a program that was built with older headers would no longer work. */
#define MLA_ABI_VERSION 1

typedef int32_t mla_token;

typedef struct mla_engine mla_engine;
typedef struct mla_session mla_session;
typedef struct mla_sampler mla_sampler;
typedef struct mla_cancellation mla_cancellation;

typedef enum mla_status {
    MLA_OK = 0,
    MLA_INVALID_ARGUMENT = 1, /* an argument outside its range */
    MLA_INVALID_HANDLE = 2,   /* null, closed, or of another kind */
    MLA_BAD_BUNDLE = 3,       /* no bundle, a damaged one, or one of another version */
    MLA_BAD_RUNTIME = 4,      /* a library cannot be used, or there is no GPU that it could use */
    MLA_CACHE_FULL = 5,       /* too few free pages; the text says how many tokens fit */
    MLA_CONTEXT_FULL = 6,     /* more tokens than the model's context */
    MLA_BAD_SESSION_FILE = 7, /* damaged, of another version, or of another model */
    MLA_FILE_ERROR = 8,       /* a file cannot be read or written */
    MLA_OUT_OF_MEMORY = 9,
    MLA_BUSY = 10,         /* a generation or save is under way on the session */
    MLA_CANCELLED = 11,    /* by mla_cancellation_request */
    MLA_MODEL_FAILED = 12, /* the graph failed, or its logits are not finite */
    MLA_INTERNAL = 13,     /* a mistake of ours: please report it */

    /* of text.h alone */
    MLA_BAD_TOKENIZER = 14,    /* tokenizer.json is damaged or contradicts itself */
    MLA_UNSUPPORTED = 15,      /* it is valid, but uses what this library has not */
    MLA_BUFFER_TOO_SMALL = 16, /* *count or *length has the size that is needed */
    MLA_NOT_FOUND = 17,        /* no such token */
    MLA_TOO_COMPLEX = 18,      /* a pattern needs more steps or memory than it may have */
    MLA_BAD_GRAPH = 19,  /* onnxruntime, with the operator library if any, cannot load the graph */
    MLA_BAD_KERNELS = 20 /* onnxruntime cannot load the operator library */
} mla_status;

/* MLA_ABI_VERSION of the library. Compare it with the macro before anything else. */
MLA_API uint32_t mla_abi_version(void);

/* The version of mla-deploy, such as "0.1.0". Lives as long as the library. */
MLA_API const char* mla_version(void);

/* What the last call that failed in this thread has to say: what was wrong, what was found, what is
 * allowed, what to do next, one a line, UTF-8. Never null; valid until the next call that fails in
 * this thread. */
MLA_API const char* mla_last_error(void);

/* ---- cancellation ------------------------------------------------------------------------------
 * A flag that one thread raises to stop the calls of others. Once raised it stays raised: make one
 * for each request. */

MLA_API mla_status mla_cancellation_create(mla_cancellation** cancellation);

/* Stops calls that were given the cancellation, within the graph too, and those that will be.
 * Returns at once. Not safe in a signal handler. */
MLA_API mla_status mla_cancellation_request(mla_cancellation* cancellation);

MLA_API mla_status mla_cancellation_destroy(mla_cancellation* cancellation);

/* ---- engine ------------------------------------------------------------------------------------
 * A bundle in memory, and the cache that its sessions share. */

typedef struct mla_engine_options {
    size_t struct_size;
    const char* bundle;              /* the folder */
    const char* onnxruntime_library; /* such as .../onnxruntime/capi/libonnxruntime.so.1.32.0 */
    const char* ops_library;         /* libmla_deploy_ops.so; null: onnxruntime's own kernels */
    uint64_t max_tokens;    /* the cache holds so many tokens of all sessions together, rounded up
                               to whole pages of 64; 0: the model's context. Memory is taken as it
                               is used. */
    uint32_t prefill_chunk; /* new tokens that go through the graph at once; 0: 512 */
    uint32_t threads;       /* that compute; 0: one a physical core */
    uint32_t spin;          /* not 0: waiting threads poll for a moment before they sleep, which is
                               faster, and costs power */
    uint32_t verify;        /* not 0: check the sha256 of files above 64 MiB too */
    /* since 0.2: */
    const char* device;       /* "cpu", or "cuda": the first GPU that the process sees. It must be
                                 what the bundle was exported for; null: that it is. */
    const char* cuda_library; /* libmla_deploy_cuda.so, which keeps the cache on a GPU: all of
                                 max_tokens at once. For the device cuda alone. */
} mla_engine_options;
/* clang-format off */
#define MLA_ENGINE_OPTIONS_INIT \
    {sizeof(mla_engine_options), NULL, NULL, NULL, 0, 0, 0, 1, 0, NULL, NULL}
/* clang-format on */

/* Loads a bundle. onnxruntime stays loaded until the process ends.
 * Errors: MLA_INVALID_ARGUMENT, MLA_BAD_BUNDLE, MLA_BAD_GRAPH, MLA_BAD_KERNELS,
 * MLA_BAD_RUNTIME, MLA_OUT_OF_MEMORY. */
MLA_API mla_status mla_engine_open(const mla_engine_options* options, mla_engine** engine);

/* Closes the handle. The memory is freed when the last session of the engine is destroyed. */
MLA_API mla_status mla_engine_close(mla_engine* engine);

typedef struct mla_engine_info {
    size_t struct_size;
    uint64_t capacity_tokens; /* that the cache holds, of all sessions together */
    uint64_t free_tokens;     /* of these, in pages that no session uses now */
    uint64_t bytes_per_token; /* of cache, in all layers, scales and zeros included */
    uint64_t parameters;
    uint32_t vocab_size;
    uint32_t hidden_size;
    uint32_t num_hidden_layers;
    uint32_t num_attention_heads;
    uint32_t q_lora_rank; /* 0: none */
    uint32_t kv_lora_rank;
    uint32_t qk_nope_head_dim;
    uint32_t qk_rope_head_dim;
    uint32_t v_head_dim;
    uint32_t max_position_embeddings; /* the model's context */
    mla_token bos_token_id;           /* -1: none */
    uint32_t prefill_chunk;
    char model_type[64];  /* cut if longer */
    char onnxruntime[32]; /* its version */
} mla_engine_info;
/* clang-format off */
#define MLA_ENGINE_INFO_INIT \
    {sizeof(mla_engine_info), 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, {0}, {0}}
/* clang-format on */

MLA_API mla_status mla_engine_get_info(mla_engine* engine, mla_engine_info* info);

/* The tokens that end a text, by the manifest. `count` is set to how many there are, and up to
 * `capacity` of them are written; tokens may be null if capacity is 0. */
MLA_API mla_status mla_engine_eos_tokens(mla_engine* engine, mla_token* tokens, size_t capacity,
                                         size_t* count);

/* ---- sessions ----------------------------------------------------------------------------------
 * A sequence of tokens in the cache. */

MLA_API mla_status mla_session_create(mla_engine* engine, mla_session** session);

/* Gives the session's pages back. */
MLA_API mla_status mla_session_destroy(mla_session* session);

/* Another session with the same tokens. It shares the pages and takes memory only when one of the
 * two goes on. May be called in a token callback. */
MLA_API mla_status mla_session_fork(mla_session* session, mla_session** fork);

/* Forgets all tokens but the first `length`.
 * Errors: MLA_INVALID_ARGUMENT (there are not as many), MLA_BUSY. */
MLA_API mla_status mla_session_rewind(mla_session* session, size_t length);

typedef struct mla_session_info {
    size_t struct_size;
    uint64_t length;      /* tokens in the cache */
    uint64_t room;        /* tokens that can be added now: context and free pages allow so many */
    uint64_t cache_bytes; /* of its pages, those shared with forks included */
} mla_session_info;
#define MLA_SESSION_INFO_INIT {sizeof(mla_session_info), 0, 0, 0}

/* Waits for a step that is running. */
MLA_API mla_status mla_session_get_info(mla_session* session, mla_session_info* info);

/* The tokens in the cache: `count` is set to how many there are, and up to `capacity` of them are
 * written; tokens may be null if capacity is 0. */
MLA_API mla_status mla_session_tokens(mla_session* session, mla_token* tokens, size_t capacity,
                                      size_t* count);

/* Appends tokens, `prefill_chunk` at a time, and gives the logits after the last one.
 * logits: [vocab_size], or null if they are not wanted.
 * Errors: as mla_step. */
MLA_API mla_status mla_session_prefill(mla_session* session, const mla_token* tokens, size_t count,
                                       float* logits, size_t logits_capacity);

/* Appends one token. As mla_session_prefill. */
MLA_API mla_status mla_session_decode(mla_session* session, mla_token token, float* logits,
                                      size_t logits_capacity);

/* What one session does in a step. */
typedef struct mla_request {
    size_t struct_size; /* equal in all requests of a call */
    mla_session* session;
    const mla_token* tokens; /* [token_count], at least one */
    size_t token_count;
    const size_t* positions; /* [position_count], of the new tokens after which logits are wanted;
                                null: after the last one alone, if there is a place for them */
    size_t position_count;
    float* logits;          /* [position_count or 1, vocab_size]; null: none wanted */
    size_t logits_capacity; /* floats that fit there */
} mla_request;
#define MLA_REQUEST_INIT {sizeof(mla_request), NULL, NULL, 0, NULL, 0, NULL, 0}

/* Appends tokens to several sessions of one engine at once, as many to each as it is given.
 * cancellation: null, or what stops the step.
 * Errors, after which no session has changed: MLA_INVALID_ARGUMENT (a token or position out of
 * range, a session twice or of another engine, too small a place for logits), MLA_CONTEXT_FULL,
 * MLA_CACHE_FULL, MLA_BUSY, MLA_CANCELLED, MLA_MODEL_FAILED. Logits may have been written. */
MLA_API mla_status mla_step(mla_engine* engine, const mla_request* requests, size_t count,
                            mla_cancellation* cancellation);

/* ---- session files -----------------------------------------------------------------------------
 */

/* Writes the session to a file: beside it first, then renamed over it. The file holds the tokens
 * and their cache, readable by anyone who can read the file.
 * Errors: MLA_FILE_ERROR, MLA_BUSY. */
MLA_API mla_status mla_session_save(mla_session* session, const char* path);

/* A new session from a file, which goes on exactly as the saved one would have.
 * Errors: MLA_FILE_ERROR, MLA_BAD_SESSION_FILE (nothing of it is used), MLA_CONTEXT_FULL,
 * MLA_CACHE_FULL. */
MLA_API mla_status mla_session_load(mla_engine* engine, const char* path, mla_session** session);

/* ---- sampling ----------------------------------------------------------------------------------
 * The choices apply in this order: repetition penalty, temperature, top-k, top-p, min-p. Of equal
 * logits, that of the lower token counts as the larger. */

typedef struct mla_sampling_options {
    size_t struct_size;
    double temperature; /* divides the logits; 0: the most likely token always (greedy) */
    double top_p; /* sample among the most likely tokens that have this probability together */
    double min_p; /* leave out tokens less likely than this times the most likely one */
    double repetition_penalty; /* makes tokens that occurred less likely; 1: off */
    uint32_t top_k;            /* sample among the k most likely tokens; 0: among all */
    uint32_t seeded;           /* not 0: use `seed`; else another seed every time */
    uint64_t seed;             /* the same seed, bundle and machine give the same tokens */
} mla_sampling_options;
/* clang-format off */
#define MLA_SAMPLING_OPTIONS_INIT {sizeof(mla_sampling_options), 0.0, 1.0, 0.0, 1.0, 0, 0, 0}
/* clang-format on */

/* For loops of one's own; mla_generate makes its own sampler. options: null: greedy.
 * Errors: MLA_INVALID_ARGUMENT. */
MLA_API mla_status mla_sampler_create(const mla_sampling_options* options, uint32_t vocab_size,
                                      mla_sampler** sampler);

MLA_API mla_status mla_sampler_destroy(mla_sampler* sampler);

/* Notes tokens of the sequence, for the repetition penalty. */
MLA_API mla_status mla_sampler_observe(mla_sampler* sampler, const mla_token* tokens, size_t count);

/* The next token. logits: [vocab_size].
 * Errors: MLA_INVALID_ARGUMENT, MLA_MODEL_FAILED (the logits are not finite). */
MLA_API mla_status mla_sampler_pick(mla_sampler* sampler, const float* logits, size_t vocab_size,
                                    mla_token* token);

/* The tokens that could be picked and their probabilities; `count` is set to how many there are,
 * and up to `capacity` of them are written. Errors: as mla_sampler_pick. */
MLA_API mla_status mla_sampler_distribution(mla_sampler* sampler, const float* logits,
                                            size_t vocab_size, mla_token* tokens,
                                            double* probabilities, size_t capacity, size_t* count);

/* ---- generation --------------------------------------------------------------------------------
 */

/* Gets each new token, in the thread that called mla_generate. Not 0: stop. It may call any
 * function on any handle; those that would change the session being generated give MLA_BUSY. It
 * must not throw or jump out. */
typedef int (*mla_token_callback)(void* user_data, mla_token token);

typedef enum mla_finish_reason {
    MLA_FINISH_NONE = 0,
    MLA_FINISH_EOS = 1,      /* the model ended the text */
    MLA_FINISH_STOP = 2,     /* one of stop_tokens came */
    MLA_FINISH_LENGTH = 3,   /* max_tokens were made */
    MLA_FINISH_CONTEXT = 4,  /* the context or the cache has no room for another token */
    MLA_FINISH_CALLBACK = 5, /* the callback said so */
    MLA_FINISH_CANCELLED = 6 /* mla_cancellation_request */
} mla_finish_reason;

typedef struct mla_generate_options {
    size_t struct_size;
    const mla_sampling_options* sampling; /* null: greedy */
    const mla_token* stop_tokens;         /* [stop_token_count], besides the model's own */
    size_t stop_token_count;
    mla_token_callback callback;    /* null: none */
    void* user_data;                /* for the callback */
    mla_cancellation* cancellation; /* null: none */
    uint32_t max_tokens;            /* generate at most so many, at least 1 */
    uint32_t ignore_eos;            /* not 0: the model's end tokens are tokens as others are */
} mla_generate_options;
/* clang-format off */
#define MLA_GENERATE_OPTIONS_INIT \
    {sizeof(mla_generate_options), NULL, NULL, 0, NULL, NULL, NULL, 256, 0}
/* clang-format on */

typedef struct mla_generation {
    size_t struct_size;
    mla_token* tokens;      /* in: a place for the new tokens, or null if the callback does */
    size_t capacity;        /* in: tokens that fit there; at least max_tokens if there is a place */
    size_t token_count;     /* out: tokens made, with the one that ended the text */
    uint64_t prompt_tokens; /* out, from here on: of the whole prompt */
    uint64_t reused_tokens; /* of these, found in the session's cache */
    double prefill_ms;      /* from the prompt to the first logits */
    double decode_ms;       /* decode steps and sampling, without the time in the callback */
    uint64_t cache_bytes;   /* of the session's pages at the end */
    mla_finish_reason finish_reason;
} mla_generation;
/* clang-format off */
#define MLA_GENERATION_INIT \
    {sizeof(mla_generation), NULL, 0, 0, 0, 0, 0.0, 0.0, 0, MLA_FINISH_NONE}
/* clang-format on */

/* Continues a prompt. The session's cache is used again for as much of the prompt as it holds
 * already, and the rest is forgotten; afterwards it holds the prompt and all new tokens but the
 * last. A prompt is computed chunk by chunk, so that other sessions get their turn in between.
 *
 * prompt: [prompt_count], at least one.
 * options: null: greedy, 256 tokens.
 * Stopping early, by callback or cancellation, is no error: see finish_reason.
 * Errors: MLA_INVALID_ARGUMENT, MLA_CONTEXT_FULL, MLA_CACHE_FULL, MLA_BUSY, MLA_MODEL_FAILED. The
 * result then has the tokens made before, and the session holds no more of the prompt than it did
 * if there are none. */
MLA_API mla_status mla_generate(mla_session* session, const mla_token* prompt, size_t prompt_count,
                                const mla_generate_options* options, mla_generation* generation);

#ifdef __cplusplus
}
#endif

#endif /* MLA_DEPLOY_RUNTIME_H */
