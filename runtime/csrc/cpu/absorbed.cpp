// Absorbed mode: multi-query attention in the latent space.
//
//     project   q_latent = w_uk^T q_nope, q_pe rotated          tasks: head x tokens
//     attend    partial softmax sums over runs of pages         tasks: rows x runs of pages
//     merge     the partials by their maxima, times w_uv        tasks: head x tokens
//
// A row is one head of one token. The rows of a task share every page that it reads, so the split
// over pages comes first and the split over rows only beyond kTaskRows.
#include <cmath>

#include "cpu/call.h"
#include "cpu/error.h"

namespace mla::cpu {
namespace {

constexpr int kTaskRows = 128;    // rows of one attend task: their sums stay in L2
constexpr int64_t kMinPages = 8;  // of one attend task: below, the merge costs more than it wins
constexpr int64_t kRoundRows = 8192;  // rows at a time: bounds the workspace
constexpr int kTasksPerThread = 3;    // so that a slow thread is helped out
constexpr int kProjectTokens = 32;    // tokens of one project or merge task

// Neighbouring tokens of one sequence.
struct Segment {
    int64_t b, s, count;
    int64_t row;  // of its first token's head 0
};

// Neighbouring rows of one segment, and the tasks that share them.
struct RowBlock {
    int64_t segment, row, rows;
    int64_t pages, splits;
    int64_t first_task;
};

struct Round {
    Segment* segments;
    int64_t segment_count;
    int64_t tokens;
    RowBlock* blocks;
    int64_t block_count;
    int64_t task_count;
    // per token of the round
    int64_t* token_segment;
    // per row
    float *q_latent, *q_pe;
    int64_t *visible, *row_block;
    // per task
    AttendTask* tasks;
    float *max, *sum, *o;  // [task rows summed], o also [D]
    float* merge_scratch;
    uint8_t* task_scratch;
    size_t task_scratch_bytes;
};

class Absorbed {
  public:
    Absorbed(const Call& call, const bool* is_mine) : call_(call), is_mine_(is_mine) {}

    Status run(bool encode_first) {
        const LatentAttentionParams& p = *call_.params;
        const int64_t per_round =
            kRoundRows / call_.dims.heads > 0 ? kRoundRows / call_.dims.heads : 1;
        Cursor cursor = {};
        bool encode = encode_first;
        while (cursor.b < p.batch) {
            Cursor next = cursor;
            Carver measure(nullptr);
            lay_out(measure, cursor, per_round, &next);
            if (!p.workspace->reserve(measure.used()))
                return fail(Status::kOutOfMemory, "out of memory for a workspace of %zu bytes",
                            measure.used());
            Carver carver(p.workspace->memory);
            lay_out(carver, cursor, per_round, &next);
            if (round_.tokens > 0) run_round(encode);
            encode = false;
            cursor = next;
        }
        return Status::kOk;
    }

  private:
    struct Cursor {
        int64_t b, s;
    };

    int64_t heads() const { return call_.dims.heads; }

    // Visits the segments of one round from `at` on; returns the tokens seen.
    template <class Visit>
    int64_t visit_segments(Cursor at, int64_t limit, Cursor* next, const Visit& visit) const {
        int64_t tokens = 0;
        while (at.b < call_.params->batch && tokens < limit) {
            const int64_t left = is_mine_[at.b] ? call_.fresh(at.b) - at.s : 0;
            const int64_t count = left < limit - tokens ? left : limit - tokens;
            if (count > 0) visit(Segment{at.b, at.s, count, tokens * heads()});
            tokens += count > 0 ? count : 0;
            if (count == left || left <= 0)
                at = {at.b + 1, 0};
            else
                at.s += count;
        }
        *next = at;
        return tokens;
    }

    // Visits the blocks of rows of a segment.
    template <class Visit>
    void visit_blocks(const Segment& segment, const Visit& visit) const {
        const int64_t rows = segment.count * heads();
        for (int64_t row = 0; row < rows; row += kTaskRows) {
            const int64_t count = rows - row < kTaskRows ? rows - row : kTaskRows;
            const int64_t last_token = segment.s + (row + count - 1) / heads();
            const int64_t seen = call_.past(segment.b) + last_token + 1;
            visit(segment.row + row, count, (seen + kPageTokens - 1) / kPageTokens);
        }
    }

    int64_t splits_of(int64_t rows, int64_t pages, int64_t total_work) const {
        const ParallelFor& parallel = call_.params->parallel;
        if (!parallel.run || parallel.threads <= 1) return 1;
        const int64_t wanted = static_cast<int64_t>(parallel.threads) * kTasksPerThread;
        int64_t splits = (wanted * rows * pages + total_work - 1) / total_work;
        const int64_t most = pages / kMinPages;
        if (splits > most) splits = most;
        return splits < 1 ? 1 : splits;
    }

    void lay_out(Carver& carver, Cursor from, int64_t limit, Cursor* next) {
        Round& r = round_;
        r = {};
        int64_t total_work = 0, task_rows = 0;
        r.tokens = visit_segments(from, limit, next, [&](const Segment& segment) {
            ++r.segment_count;
            visit_blocks(segment, [&](int64_t, int64_t rows, int64_t pages) {
                ++r.block_count;
                total_work += rows * pages;
            });
        });
        r.segments = carver.take<Segment>(r.segment_count);
        r.blocks = carver.take<RowBlock>(r.block_count);
        r.token_segment = carver.take<int64_t>(r.tokens);
        int64_t segment_index = 0, block_index = 0;
        visit_segments(from, limit, next, [&](const Segment& segment) {
            if (r.segments) {
                r.segments[segment_index] = segment;
                const int64_t first = segment.row / heads();
                for (int64_t t = 0; t < segment.count; ++t)
                    r.token_segment[first + t] = segment_index;
            }
            visit_blocks(segment, [&](int64_t row, int64_t rows, int64_t pages) {
                const int64_t splits = splits_of(rows, pages, total_work);
                if (r.blocks)
                    r.blocks[block_index] = {segment_index, row, rows, pages, splits, r.task_count};
                r.task_count += splits;
                task_rows += splits * rows;
                ++block_index;
            });
            ++segment_index;
        });
        const int64_t rows = r.tokens * heads();
        r.q_latent = carver.take<float>(rows * call_.dims.rank);
        r.q_pe = carver.take<float>(rows * call_.dims.rope);
        r.visible = carver.take<int64_t>(rows);
        r.row_block = carver.take<int64_t>(rows);
        r.tasks = carver.take<AttendTask>(r.task_count);
        r.max = carver.take<float>(task_rows);
        r.sum = carver.take<float>(task_rows);
        r.o = carver.take<float>(task_rows * call_.dims.rank);
        const int64_t widest = rows < kTaskRows ? rows : kTaskRows;
        r.task_scratch_bytes =
            call_.kernels->attend_scratch(call_.record, static_cast<int>(widest));
        const size_t merge_bytes = merge_scratch_floats() * sizeof(float);
        if (r.task_scratch_bytes < merge_bytes) r.task_scratch_bytes = merge_bytes;
        r.task_scratch_bytes = align_up(r.task_scratch_bytes);
        const int slots = ScratchPool::slots_for(call_.params->parallel);
        r.task_scratch = carver.take<uint8_t>(static_cast<int64_t>(r.task_scratch_bytes) * slots);
        if (r.tasks) fill_tasks();
    }

    // Project and merge: kMatmulRows rows of inputs and outputs.
    size_t merge_scratch_floats() const {
        const PreparedWeights& w = *call_.params->weights;
        const int in = w.rank_padded > w.nope_padded ? w.rank_padded : w.nope_padded;
        const int out = w.rank_padded > w.v_padded ? w.rank_padded : w.v_padded;
        return static_cast<size_t>(kMatmulRows) * (in + out);
    }

    void fill_tasks() {
        Round& r = round_;
        int64_t task_row = 0;
        for (int64_t i = 0; i < r.block_count; ++i) {
            const RowBlock& block = r.blocks[i];
            const Segment& segment = r.segments[block.segment];
            for (int64_t row = block.row; row < block.row + block.rows; ++row) {
                r.row_block[row] = i;
                r.visible[row] =
                    call_.past(segment.b) + segment.s + (row - segment.row) / heads() + 1;
            }
            for (int64_t k = 0; k < block.splits; ++k) {
                AttendTask& task = r.tasks[block.first_task + k];
                task = {};
                task.record = &call_.record;
                task.pages = call_.pages(segment.b);
                task.page_begin = block.pages * k / block.splits;
                task.page_end = block.pages * (k + 1) / block.splits;
                task.length = call_.past(segment.b) + call_.fresh(segment.b);
                task.rows = static_cast<int>(block.rows);
                task.q_latent = r.q_latent + block.row * call_.dims.rank;
                task.q_pe = r.q_pe + block.row * call_.dims.rope;
                task.visible = r.visible + block.row;
                task.exact = call_.params->weights->exact();
                task.max = r.max + task_row;
                task.sum = r.sum + task_row;
                task.o = r.o + task_row * call_.dims.rank;
                task_row += block.rows;
            }
        }
    }

    void run_round(bool encode) {
        const ParallelFor& parallel = call_.params->parallel;
        ScratchPool pool(round_.task_scratch, round_.task_scratch_bytes,
                         ScratchPool::slots_for(parallel));
        const int64_t encode_tasks = encode ? encode_task_count(call_) : 0;
        const int64_t cuts = (round_.tokens + kProjectTokens - 1) / kProjectTokens;
        parallel_for(parallel, encode_tasks + cuts * heads(), [&](int64_t i) {
            if (i < encode_tasks) return run_encode_task(call_, i);
            Scratch scratch(pool, i);
            project(static_cast<int>((i - encode_tasks) / cuts), (i - encode_tasks) % cuts,
                    reinterpret_cast<float*>(scratch.memory()));
        });
        parallel_for(parallel, round_.task_count, [&](int64_t i) {
            Scratch scratch(pool, i);
            AttendTask task = round_.tasks[i];
            task.scratch = scratch.memory();
            call_.kernels->attend(task);
        });
        parallel_for(parallel, cuts * heads(), [&](int64_t i) {
            Scratch scratch(pool, i);
            merge(static_cast<int>(i / cuts), i % cuts, reinterpret_cast<float*>(scratch.memory()));
        });
    }

    // Tokens [first, first + count) of the round: at most kMatmulRows.
    template <class Body>
    void visit_token_groups(int64_t cut, const Body& body) const {
        const int64_t end =
            (cut + 1) * kProjectTokens < round_.tokens ? (cut + 1) * kProjectTokens : round_.tokens;
        for (int64_t first = cut * kProjectTokens; first < end; first += kMatmulRows)
            body(first, static_cast<int>(end - first < kMatmulRows ? end - first : kMatmulRows));
    }

    const Segment& segment_of(int64_t token) const {
        return round_.segments[round_.token_segment[token]];
    }

    void project(int head, int64_t cut, float* scratch) const {
        const AttentionDims& d = call_.dims;
        const PreparedWeights& w = *call_.params->weights;
        const float scale = call_.params->softmax_scale * kLog2E;
        visit_token_groups(cut, [&](int64_t first, int rows) {
            MatmulTask task = {};
            task.rows = rows;
            task.k = d.nope;
            task.n = d.rank;
            task.w = w.head_uk(head);
            task.layout = w.uk_layout();
            task.stride = w.rank_padded;
            task.scale =
                w.uk_scale ? w.uk_scale + static_cast<int64_t>(head) * w.rank_padded : nullptr;
            for (int i = 0; i < rows; ++i) {
                const Segment& segment = segment_of(first + i);
                const int64_t s = segment.s + first + i - segment.row / heads();
                const int64_t row = (first + i) * heads() + head;
                const float* q = call_.q(segment.b, s, head);
                float* x = scratch + i * w.nope_padded;
                for (int n = 0; n < d.nope; ++n) x[n] = q[n] * scale;
                rotate(q + d.nope, call_.cos(segment.b, s), call_.sin(segment.b, s), d.rope, scale,
                       round_.q_pe + row * d.rope);
                task.x[i] = x;
                task.out[i] = round_.q_latent + row * d.rank;
            }
            call_.kernels->matmul(task);
        });
    }

    // The softmax over all pages from the softmax over each run of them; to x [D].
    void merge_row(int64_t row, float* x) const {
        const int rank = call_.dims.rank;
        const RowBlock& block = round_.blocks[round_.row_block[row]];
        const int64_t at = row - block.row;
        float max = kNothingSeen;
        for (int64_t k = 0; k < block.splits; ++k)
            max = std::fmax(max, round_.tasks[block.first_task + k].max[at]);
        float sum = 0;
        for (int64_t k = 0; k < block.splits; ++k) {
            const AttendTask& task = round_.tasks[block.first_task + k];
            sum += std::exp2(task.max[at] - max) * task.sum[at];
        }
        for (int64_t k = 0; k < block.splits; ++k) {
            const AttendTask& task = round_.tasks[block.first_task + k];
            const float weight = std::exp2(task.max[at] - max) / sum;
            const float* o = task.o + at * rank;
            if (k == 0)
                for (int c = 0; c < rank; ++c) x[c] = weight * o[c];
            else
                for (int c = 0; c < rank; ++c) x[c] += weight * o[c];
        }
    }

    void merge(int head, int64_t cut, float* scratch) const {
        const AttentionDims& d = call_.dims;
        const PreparedWeights& w = *call_.params->weights;
        float* outputs = scratch + static_cast<int64_t>(kMatmulRows) * w.rank_padded;
        visit_token_groups(cut, [&](int64_t first, int rows) {
            MatmulTask task = {};
            task.rows = rows;
            task.k = d.rank;
            task.n = w.v_padded;
            task.w = w.head_uv(head);
            task.layout = w.uv_layout();
            task.stride = w.v_padded;
            task.scale =
                w.uv_scale ? w.uv_scale + static_cast<int64_t>(head) * w.v_padded : nullptr;
            for (int i = 0; i < rows; ++i) {
                float* x = scratch + i * w.rank_padded;
                merge_row((first + i) * heads() + head, x);
                task.x[i] = x;
                task.out[i] = outputs + i * w.v_padded;
            }
            call_.kernels->matmul(task);
            for (int i = 0; i < rows; ++i) {
                const Segment& segment = segment_of(first + i);
                const int64_t s = segment.s + first + i - segment.row / heads();
                float* output = call_.output(segment.b, s, head);
                for (int v = 0; v < d.v; ++v) output[v] = task.out[i][v];
            }
        });
    }

    const Call& call_;
    const bool* is_mine_;
    Round round_ = {};
};

}  // namespace

Status attend_absorbed(const Call& call, const bool* is_mine, bool encode_first) {
    return Absorbed(call, is_mine).run(encode_first);
}

}  // namespace mla::cpu
