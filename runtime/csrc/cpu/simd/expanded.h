// ChunkTask and HeadTask: the expanded mode. Mat is the matrix product: its element, how many rows
// of the right side lie interleaved (pair), and run().
#pragma once

#include "cpu/simd/decode.h"
#include "cpu/simd/gemm.h"

namespace mla::cpu {
namespace {

// c [rows, columns] = a [rows, depth] b [depth, columns] in fp32.
template <class X>
struct MatFp32 {
    using Element = float;
    static constexpr int kPair = 1;
    static void begin() {}
    static void end() {}
    static void run(int rows, int columns, int depth, const float* a, int64_t lda, const float* b,
                    int64_t ldb, float* c, int64_t ldc) {
        Gemm<X>::run(rows, columns, depth, a, lda, b, ldb, c, ldc, false);
    }
    static void store(float* p, typename X::F x) { X::store(p, x); }
};

template <class X, class Mat>
struct Expanded {
    using F = typename X::F;
    using E = typename Mat::Element;
    static constexpr int kPair = Mat::kPair;
    static constexpr int kQueryBlock = 64;
    static constexpr int kKeyBlock = 64;  // rows of K rebuilt at a time

    // [depth, tokens] floats to columns [depth / pair][ld][pair]; tokens a multiple of 16.
    static void store_columns(const float* from, int64_t ldf, int depth, int tokens, E* to,
                              int64_t ld) {
        for (int k = 0; k < depth; k += kPair)
            for (int t = 0; t < tokens; t += 16) {
                E* at = to + k * ld + t * kPair;
                const F x = X::load(from + k * ldf + t);
                if constexpr (kPair == 2)
                    X::store_bf16_pairs(at, x, X::load(from + (k + 1) * ldf + t));
                else
                    X::store(at, x);
            }
    }

    // ---- decode -----------------------------------------------------------------------------

    static size_t chunk_scratch(const Record& record) {
        const size_t rank = static_cast<size_t>(record.rank) + 32;
        const size_t rope = static_cast<size_t>(record.rope) + 32;
        return sizeof(float) *
               (kPageTokens * (2 * rank + rope) + Decoder<X>::scratch_floats(record));
    }

    static void decode(const ChunkTask& task) {
        const Record& record = *task.record;
        const int64_t left = task.length - task.page * kPageTokens;
        const int valid = left < kPageTokens ? static_cast<int>(left) : kPageTokens;
        float* columns = reinterpret_cast<float*>(task.scratch);
        float* pe = columns + int64_t{task.rank_padded} * kPageTokens;
        float* rows = pe + int64_t{task.rope_padded} * kPageTokens;
        float* scratch = rows + int64_t{record.rank} * kPageTokens;
        Decoder<X>::decode_page(record, view_page(record, task.pages[task.page]), valid, rows,
                                columns, pe, scratch);
        for (int64_t i = int64_t{record.rank} * kPageTokens; i < task.rank_padded * kPageTokens;
             ++i)
            columns[i] = 0;
        for (int64_t i = int64_t{record.rope} * kPageTokens; i < task.rope_padded * kPageTokens;
             ++i)
            pe[i] = 0;
        store_columns(columns, kPageTokens, task.rank_padded, kPageTokens,
                      static_cast<E*>(task.c_columns), kChunkStride);
        store_columns(pe, kPageTokens, task.rope_padded, kPageTokens,
                      static_cast<E*>(task.pe_columns), kChunkStride);
        for (int t = 0; t < kPageTokens; ++t) {
            E* to = static_cast<E*>(task.c_rows) + int64_t{t} * task.rank_padded;
            for (int i = 0; i < record.rank; i += 16)
                Mat::store(to + i, X::load(rows + int64_t{t} * record.rank + i));
            for (int i = record.rank; i < task.rank_padded; ++i) to[i] = 0;
        }
    }

    // ---- attend -----------------------------------------------------------------------------

    struct Buffers {
        E *keys, *values, *p;
        float* c;
        size_t bytes;
    };

    static Buffers lay_out(uint8_t* memory, const HeadTask& task) {
        Buffers b = {};
        const auto take = [&](int64_t bytes) {
            uint8_t* at = memory ? memory + b.bytes : nullptr;
            b.bytes += static_cast<size_t>((bytes + 63) / 64 * 64);
            return at;
        };
        const int64_t e = sizeof(E), key = task.nope_padded + task.rope_padded;
        b.keys = reinterpret_cast<E*>(take(key * kChunkStride * e));
        b.values = reinterpret_cast<E*>(take(int64_t{kChunkTokens} * task.v_padded * e));
        b.p = reinterpret_cast<E*>(take(int64_t{kQueryBlock} * kChunkStride * e));
        // Scores, keys or values before they are packed, or what a block adds to o.
        const int64_t widest = kChunkStride > task.v_padded ? kChunkStride : task.v_padded;
        b.c = reinterpret_cast<float*>(take(kQueryBlock * widest * 4));
        return b;
    }

    static size_t head_scratch(const HeadTask& task) { return lay_out(nullptr, task).bytes; }

    static void rebuild(const HeadTask& task, Buffers& b) {
        const int tokens = task.chunk_tokens;
        const E* w_uk = static_cast<const E*>(task.w_uk);
        for (int n = 0; n < task.nope_padded; n += kKeyBlock) {
            const int rows = task.nope_padded - n < kKeyBlock ? task.nope_padded - n : kKeyBlock;
            Mat::run(rows, tokens, task.rank_padded, w_uk + int64_t{n} * task.rank_padded,
                     task.rank_padded, static_cast<const E*>(task.c_columns), kChunkStride, b.c,
                     kChunkStride);
            store_columns(b.c, kChunkStride, rows, tokens, b.keys + int64_t{n} * kChunkStride,
                          kChunkStride);
        }
        for (int k = 0; k < task.rope_padded; k += kPair)
            __builtin_memcpy(b.keys + int64_t{task.nope_padded + k} * kChunkStride,
                             static_cast<const E*>(task.pe_columns) + int64_t{k} * kChunkStride,
                             sizeof(E) * static_cast<size_t>(kPair) * tokens);
        for (int t = 0; t < tokens; t += kPageTokens) {
            Mat::run(kPageTokens, task.v_padded, task.rank_padded,
                     static_cast<const E*>(task.c_rows) + int64_t{t} * task.rank_padded,
                     task.rank_padded, static_cast<const E*>(task.w_uv), task.v_padded, b.c,
                     task.v_padded);
            store_columns(b.c, task.v_padded, kPageTokens, task.v_padded,
                          b.values + int64_t{t} * task.v_padded, task.v_padded);
        }
    }

    // One row's scores to probabilities, over `tokens` of which `seen` count.
    static void softmax_row(const HeadTask& task, int s, float* score, int tokens, int64_t seen,
                            E* p) {
        F tops = X::set(kNothingSeen);
        for (int t = 0; t < tokens; t += 16) {
            F x = X::load(score + t);
            if (seen < t + 16) {
                x = X::first_lanes(seen > t ? static_cast<int>(seen - t) : 0, x,
                                   X::set(kNothingSeen));
                X::store(score + t, x);
            }
            tops = X::max(tops, x);
        }
        const float top = X::highest(tops);
        const float max = task.max[s] > top ? task.max[s] : top;
        const F shift = X::set(max > kNothingSeen / 2 ? max : 0);
        F sums = X::set(0);
        for (int t = 0; t < tokens; t += 16) {
            const F x = X::exp2(X::sub(X::load(score + t), shift));
            sums = X::add(sums, x);
            Mat::store(p + t, x);
        }
        if (task.max[s] != max) {
            float lanes[16];
            X::store(lanes, X::exp2(X::set(task.max[s] - max)));
            const float alpha = lanes[0];
            task.sum[s] *= alpha;
            float* o = task.o + int64_t{s} * task.v_padded;
            for (int v = 0; v < task.v_padded; v += 16)
                X::store(o + v, X::mul(X::load(o + v), X::set(alpha)));
            task.max[s] = max;
        }
        task.sum[s] += X::sum(sums);
    }

    static void attend(const HeadTask& task) {
        const typename X::FlushDenormals guard;
        Buffers b = lay_out(task.scratch, task);
        Mat::begin();
        rebuild(task, b);
        const int key = task.nope_padded + task.rope_padded;
        for (int s = 0; s < task.queries; s += kQueryBlock) {
            const int rows = task.queries - s < kQueryBlock ? task.queries - s : kQueryBlock;
            const int tile_rows = (rows + 15) / 16 * 16;
            // What the block's last query sees of the chunk, in whole pages.
            int64_t seen = task.past + s + rows - task.chunk_begin;
            if (seen <= 0) continue;
            if (seen > task.chunk_tokens) seen = task.chunk_tokens;
            const int tokens =
                static_cast<int>((seen + kPageTokens - 1) / kPageTokens) * kPageTokens;
            Mat::run(tile_rows, tokens, key, static_cast<const E*>(task.q) + int64_t{s} * key, key,
                     b.keys, kChunkStride, b.c, kChunkStride);
            for (int r = 0; r < rows; ++r)
                softmax_row(task, s + r, b.c + int64_t{r} * kChunkStride, tokens,
                            task.past + s + r + 1 - task.chunk_begin,
                            b.p + int64_t{r} * kChunkStride);
            for (int64_t i = int64_t{rows} * kChunkStride; i < tile_rows * kChunkStride; i += 16)
                Mat::store(b.p + i, X::set(0));
            Mat::run(tile_rows, task.v_padded, tokens, b.p, kChunkStride, b.values, task.v_padded,
                     b.c, task.v_padded);
            float* o = task.o + int64_t{s} * task.v_padded;
            for (int64_t i = 0; i < int64_t{rows} * task.v_padded; i += 16)
                X::store(o + i, X::add(X::load(o + i), X::load(b.c + i)));
        }
        Mat::end();
    }
};

// Tasks say whether they want bf16; an instruction set without it never gets to see one.
template <class X, class Mat>
struct ExpandedEntry {
    static constexpr bool kHasBf16 = Mat::kPair == 2;
    using Fast = Expanded<X, Mat>;
    using Exact = Expanded<X, MatFp32<X>>;

    static size_t chunk_scratch(const Record& record) { return Exact::chunk_scratch(record); }
    static void decode(const ChunkTask& task) {
        task.bf16 ? Fast::decode(task) : Exact::decode(task);
    }
    static size_t head_scratch(const HeadTask& task) {
        return task.bf16 ? Fast::head_scratch(task) : Exact::head_scratch(task);
    }
    static void attend(const HeadTask& task) {
        task.bf16 ? Fast::attend(task) : Exact::attend(task);
    }
};

}  // namespace
}  // namespace mla::cpu
