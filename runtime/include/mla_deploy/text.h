/* Text for mla-deploy's engine: a Hugging Face tokenizer.json, in C.
 *
 *     text --encode--> token ids --engine--> token ids --decode, or a stream--> text
 *
 * Ids and text are those of the Python package tokenizers, exactly. Supported is what models with
 * MLA use: byte-level and SentencePiece-style BPE, that is
 *
 *     normalizer      Sequence, Prepend, Replace, NFC
 *     pre-tokenizer   Sequence, Split, ByteLevel, Digits, Metaspace
 *     model           BPE with byte_fallback, fuse_unk, ignore_merges
 *     post-processor  Sequence, TemplateProcessing, ByteLevel
 *     decoder         Sequence, ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace
 *
 * and added tokens with all their flags. Anything else gives MLA_UNSUPPORTED when the file is
 * opened, with its name in the error.
 *
 * The rules of runtime.h hold: on errors, handles, threads and memory. Besides:
 *
 * - Handles may be closed in any order: a stream keeps what it needs of its tokenizer.
 * - Threads. A tokenizer serves any number at once; calls on one stream wait for one another.
 * - Text is UTF-8 with a length, so that it may hold zeros; nothing is null-terminated but paths.
 * - No input is trusted, tokenizer.json included.
 */
#ifndef MLA_DEPLOY_TEXT_H
#define MLA_DEPLOY_TEXT_H

#include "mla_deploy/runtime.h" /* mla_status, mla_token, MLA_API */

#ifdef __cplusplus
extern "C" {
#endif

typedef struct mla_tokenizer mla_tokenizer;
typedef struct mla_text_stream mla_text_stream;

/* ---- tokenizer --------------------------------------------------------------------------------*/

/* Opens a tokenizer.json.
 * Errors: MLA_FILE_ERROR, MLA_BAD_TOKENIZER, MLA_UNSUPPORTED. */
MLA_API mla_status mla_tokenizer_open(const char* path, mla_tokenizer** tokenizer);

/* The same from the `size` bytes of such a file, which are read during the call only. */
MLA_API mla_status mla_tokenizer_open_bytes(const char* json, size_t size,
                                            mla_tokenizer** tokenizer);

MLA_API mla_status mla_tokenizer_close(mla_tokenizer* tokenizer);

/* One more than the largest id. */
MLA_API mla_status mla_tokenizer_vocab_size(mla_tokenizer* tokenizer, uint32_t* size);

/* The id of a token by its exact content, such as "<s>".
 * Errors: MLA_NOT_FOUND. */
MLA_API mla_status mla_tokenizer_token_id(mla_tokenizer* tokenizer, const char* content,
                                          size_t length, mla_token* id);

/* Writes the ids of `text` to ids[0..*count). add_special_tokens, if not 0: with what the
 * post-processor adds, such as a leading <s>. Special tokens that stand in the text itself are
 * found either way. Text seldom has more tokens than bytes, so length + 16 is nearly always enough.
 * Errors: MLA_BUFFER_TOO_SMALL if there are more than `capacity` of them: *count says how
 * many; MLA_INVALID_ARGUMENT if the text is not UTF-8 or has 2^31 bytes or more;
 * MLA_TOO_COMPLEX. */
MLA_API mla_status mla_tokenizer_encode(mla_tokenizer* tokenizer, const char* text, size_t length,
                                        int add_special_tokens, mla_token* ids, size_t capacity,
                                        size_t* count);

/* Writes the text of ids[0..count) to text[0..*length): always UTF-8, with U+FFFD for bytes that
 * are none. Ids of no token, such as those that pad a model's vocabulary, have no text.
 * skip_special_tokens, if not 0: special tokens have none either.
 * Errors: MLA_BUFFER_TOO_SMALL if there are more than `capacity` bytes: *length says how
 * many. */
MLA_API mla_status mla_tokenizer_decode(mla_tokenizer* tokenizer, const mla_token* ids,
                                        size_t count, int skip_special_tokens, char* text,
                                        size_t capacity, size_t* length);

/* ---- stream ------------------------------------------------------------------------------------
 * Decodes ids as they come. All pieces joined are exactly what mla_tokenizer_decode gives for all
 * ids at once, and each piece is UTF-8 on its own: half a character waits for its other half. With
 * the decoder ByteFallback a run of byte tokens waits for its end, since one wrong byte spoils the
 * whole run. */

MLA_API mla_status mla_text_stream_create(mla_tokenizer* tokenizer, int skip_special_tokens,
                                          mla_text_stream** stream);

/* The text that is complete now that `id` has come: (*text)[0..*length), often empty. It belongs
 * to the stream and lives until the next call on it. */
MLA_API mla_status mla_text_stream_push(mla_text_stream* stream, mla_token id, const char** text,
                                        size_t* length);

/* What is left when no more ids come, U+FFFD for half a character. The stream is then as new. */
MLA_API mla_status mla_text_stream_flush(mla_text_stream* stream, const char** text,
                                         size_t* length);

MLA_API mla_status mla_text_stream_destroy(mla_text_stream* stream);

#ifdef __cplusplus
}
#endif

#endif
