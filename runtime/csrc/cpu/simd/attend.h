// AttendTask: rows of absorbed queries against a run of pages, a page at a time.
#pragma once

#include "cpu/simd/decode.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/quant_dot.h"

namespace mla::cpu {
namespace {

// A row's maximum is raised only when a page exceeds it by this much (in log2): its sums are then
// rescaled, which is rare, and no weight passes 2^kSlack.
constexpr float kSlack = 8;

// Dot: how the scores and values of int4 and int8 pages are computed.
template <class X, class Dot>
struct Attend {
    using F = typename X::F;

    // Groups below 32 channels are too narrow for the dots; exact tasks want no 8-bit queries.
    static bool through_codes(const Record& record, bool exact) {
        return !exact && !record.is_float() && record.group >= 32;
    }

    static int padded(int rows) { return (rows + 15) / 16 * 16; }

    struct Buffers {
        float *scores, *beta, *alpha, *top, *pe_columns, *page_floats;
        float *c_rows, *c_columns;
        QuantRows quant;
        QuantPage page;
        uint8_t* lines;
        size_t bytes;
    };

    static Buffers lay_out(uint8_t* memory, const Record& record, int rows) {
        Buffers b = {};
        const auto take = [&](int64_t bytes) {
            uint8_t* at = memory ? memory + b.bytes : nullptr;
            b.bytes += static_cast<size_t>((bytes + 63) / 64 * 64);
            return at;
        };
        const auto floats = [&](int64_t count) {
            return reinterpret_cast<float*>(take(count * 4));
        };
        const int all = padded(rows);
        const int64_t rank = record.rank, groups = record.groups;
        b.scores = floats(int64_t{all} * kPageTokens);
        b.beta = floats(all);
        b.alpha = floats(all);
        b.top = floats(all);
        b.pe_columns = floats(int64_t{record.rope} * kPageTokens);
        b.page_floats = floats(static_cast<int64_t>(Decoder<X>::scratch_floats(record)));
        // run_exact()'s and run_codes()'s buffers share their place.
        const size_t shared = b.bytes;
        b.c_rows = floats(rank * kPageTokens);
        b.c_columns = floats(rank * kPageTokens);
        const size_t exact_bytes = b.bytes;
        b.bytes = shared;
        QuantRows& q = b.quant;
        q.planes = record.format == CacheFormat::kInt8 ? 2 : 1;
        for (int p = 0; p < kMaxPlanes; ++p) q.q[p] = reinterpret_cast<int8_t*>(take(all * rank));
        q.q_scale = floats(all * groups);
        q.q_sum = floats(all * groups);
        q.zeros = floats(all * groups * 16);
        q.o = floats(all * rank);
        q.o_group = int64_t{all} * record.group;
        b.page.scale = floats(groups * kPageTokens);
        b.page.zero = floats(groups * kPageTokens);
        b.page.centre = floats(groups * kPageTokens);
        b.page.share = floats(groups * kPageTokens);
        b.page.largest = floats(groups);
        b.page.pe_scale = floats(int64_t{record.rope_groups} * kPageTokens);
        b.page.pe_zero = floats(int64_t{record.rope_groups} * kPageTokens);
        b.lines = take(static_cast<int64_t>(Dot::scratch_bytes(record, rows)));
        if (b.bytes < exact_bytes) b.bytes = exact_bytes;
        return b;
    }

    static size_t scratch(const Record& record, int rows) {
        return lay_out(nullptr, record, rows).bytes;
    }

    // rows.scores to probabilities relative to the page's maximum; max, sum, alpha, beta.
    static void softmax(const AttendTask& task, int64_t page, Buffers& b) {
        const int64_t first = page * kPageTokens;
        for (int r = 0; r < task.rows; ++r) {
            float* score = b.scores + r * kPageTokens;
            const int64_t seen = task.visible[r] - first;
            F x[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                x[i] = X::load(score + 16 * i);
                if (seen < 16 * (i + 1))
                    x[i] = X::first_lanes(seen > 16 * i ? static_cast<int>(seen - 16 * i) : 0, x[i],
                                          X::set(kNothingSeen));
            }
            const F tops = X::max(X::max(x[0], x[1]), X::max(x[2], x[3]));
            const float highest = X::highest(tops);
            const F top = X::set(highest);
            F sum = X::set(0);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const F p = X::exp2(X::sub(x[i], top));
                sum = X::add(sum, p);
                X::store(score + 16 * i, p);
            }
            b.top[r] = highest;
            b.beta[r] = X::sum(sum);  // for now
        }
        for (int r = 0; r < padded(task.rows); r += 16) {
            // Rows past the end are padding of the buffers; their results are not read.
            const int count = task.rows - r < 16 ? task.rows - r : 16;
            float max_in[16], sum_in[16];
            for (int i = 0; i < 16; ++i) max_in[i] = i < count ? task.max[r + i] : 0;
            for (int i = 0; i < 16; ++i) sum_in[i] = i < count ? task.sum[r + i] : 0;
            const F top = X::load(b.top + r), max = X::load(max_in);
            const F raised = X::select_greater(top, X::add(max, X::set(kSlack)), top, max);
            const F alpha = X::exp2(X::sub(max, raised));
            const F seen = X::exp2(X::sub(top, raised));
            const F beta = X::select_greater(top, X::set(kNothingSeen / 2), seen, X::set(0));
            const F sum = X::fma(X::load(sum_in), alpha, X::mul(beta, X::load(b.beta + r)));
            X::store(b.alpha + r, alpha);
            X::store(b.beta + r, beta);
            X::store(max_in, raised);
            X::store(sum_in, sum);
            for (int i = 0; i < count; ++i) {
                task.max[r + i] = max_in[i];
                task.sum[r + i] = sum_in[i];
            }
        }
    }

    static void scale_floats(float* x, int64_t count, F factor) {
        for (int64_t i = 0; i < count; i += 16) X::store(x + i, X::mul(X::load(x + i), factor));
    }

    static void rescale(const AttendTask& task, Buffers& b, bool codes) {
        const Record& record = *task.record;
        for (int r = 0; r < task.rows; ++r) {
            if (b.alpha[r] == 1) continue;
            const F alpha = X::set(b.alpha[r]);
            if (!codes) {
                scale_floats(task.o + int64_t{r} * record.rank, record.rank, alpha);
                continue;
            }
            for (int g = 0; g < record.groups; ++g)
                scale_floats(b.quant.o_at(r, g, record.group), record.group, alpha);
            scale_floats(b.quant.zeros + int64_t{r} * record.groups * 16, record.groups * 16,
                         alpha);
        }
    }

    // zeros += beta * sum_t p_t centre_t, in lanes.
    static void add_zeros(const AttendTask& task, Buffers& b) {
        const int groups = task.record->groups;
        for (int r = 0; r < task.rows; ++r) {
            const float* p = b.scores + r * kPageTokens;
            const F beta = X::set(b.beta[r]);
            const F p0 = X::mul(X::load(p), beta), p1 = X::mul(X::load(p + 16), beta);
            const F p2 = X::mul(X::load(p + 32), beta), p3 = X::mul(X::load(p + 48), beta);
            float* zeros = b.quant.zeros + int64_t{r} * groups * 16;
            for (int g = 0; g < groups; ++g) {
                const float* centre = b.page.centre + g * kPageTokens;
                F x = X::load(zeros + 16 * g);
                x = X::fma(p0, X::load(centre), x);
                F y = X::mul(p1, X::load(centre + 16));
                x = X::fma(p2, X::load(centre + 32), x);
                y = X::fma(p3, X::load(centre + 48), y);
                X::store(zeros + 16 * g, X::add(x, y));
            }
        }
    }

    // To task.o: columns to channels, and the zeros' share.
    static void finish(const AttendTask& task, Buffers& b) {
        const Record& record = *task.record;
        const bool int4 = record.format == CacheFormat::kInt4;
        for (int r = 0; r < task.rows; ++r)
            for (int g = 0; g < record.groups; ++g) {
                const float* from = b.quant.o_at(r, g, record.group);
                float* o = task.o + int64_t{r} * record.rank + g * record.group;
                if (!int4) {
                    __builtin_memcpy(o, from, sizeof(float) * static_cast<size_t>(record.group));
                    continue;
                }
                const float zero =
                    X::sum(X::load(b.quant.zeros + (int64_t{r} * record.groups + g) * 16));
                // Columns 4 k + j of 16 low and 16 high nibbles: channels 8 k + j and 8 k + 4 + j.
                for (int c = 0; c < record.group; c += 32)
                    for (int k = 0; k < 4; ++k)
                        for (int high = 0; high < 2; ++high)
#pragma GCC unroll 4
                            for (int j = 0; j < 4; ++j)
                                o[c + 8 * k + 4 * high + j] =
                                    from[c + 16 * high + 4 * k + j] + zero;
            }
    }

    static void run_codes(const AttendTask& task) {
        const Record& record = *task.record;
        Buffers b = lay_out(task.scratch, record, task.rows);
        b.quant.rows = task.rows;
        b.quant.scores = b.scores;
        b.quant.beta = b.beta;
        Prefetcher ahead;
        b.page.ahead = &ahead;
        b.page.record = &record;
        QuantDot<X>::quantize_queries(record, task.q_latent, b.quant);
        for (int i = 0; i < task.rows * record.groups * 16; i += 16)
            X::store(b.quant.zeros + i, X::set(0));
        for (int64_t i = 0; i < int64_t{padded(task.rows)} * record.rank; i += 16)
            X::store(b.quant.o + i, X::set(0));
        Dot::begin(record, b.quant, task.q_pe, b.lines);
        for (int64_t page = task.page_begin; page < task.page_end; ++page) {
            const int64_t left = task.length - page * kPageTokens;
            const int valid = left < kPageTokens ? static_cast<int>(left) : kPageTokens;
            b.page.view = view_page(record, task.pages[page]);
            ahead.start(record, task.pages[page + 1 < task.page_end ? page + 1 : page]);
            QuantDot<X>::load_page(b.page, valid);
            Dot::add_scores(b.quant, b.page, b.lines);
            softmax(task, page, b);
            rescale(task, b, true);
            if (record.format == CacheFormat::kInt4) add_zeros(task, b);
            Dot::add_values(b.quant, b.page, b.lines);
        }
        Dot::end();
        finish(task, b);
    }

    static void run_exact(const AttendTask& task) {
        const Record& record = *task.record;
        Buffers b = lay_out(task.scratch, record, task.rows);
        for (int64_t page = task.page_begin; page < task.page_end; ++page) {
            const int64_t left = task.length - page * kPageTokens;
            const int valid = left < kPageTokens ? static_cast<int>(left) : kPageTokens;
            Decoder<X>::decode_page(record, view_page(record, task.pages[page]), valid, b.c_rows,
                                    b.c_columns, b.pe_columns, b.page_floats);
            Gemm<X>::run(task.rows, kPageTokens, record.rope, task.q_pe, record.rope, b.pe_columns,
                         kPageTokens, b.scores, kPageTokens, false);
            Gemm<X>::run(task.rows, kPageTokens, record.rank, task.q_latent, record.rank,
                         b.c_columns, kPageTokens, b.scores, kPageTokens, true);
            softmax(task, page, b);
            rescale(task, b, false);
            for (int r = 0; r < task.rows; ++r) {
                float* p = b.scores + r * kPageTokens;
                for (int t = 0; t < kPageTokens; t += 16)
                    X::store(p + t, X::mul(X::load(p + t), X::set(b.beta[r])));
            }
            Gemm<X>::run(task.rows, record.rank, kPageTokens, b.scores, kPageTokens, b.c_rows,
                         record.rank, task.o, record.rank, true);
        }
    }

    static void run(const AttendTask& task) {
        const typename X::FlushDenormals guard;
        const int64_t rank = task.record->rank;
        for (int r = 0; r < task.rows; ++r) {
            task.max[r] = kNothingSeen;
            task.sum[r] = 0;
        }
        if (through_codes(*task.record, task.exact)) return run_codes(task);
        for (int64_t i = 0; i < task.rows * rank; i += 16) X::store(task.o + i, X::set(0));
        run_exact(task);
    }
};

}  // namespace
}  // namespace mla::cpu
