// Expanded mode, for long prompts: a head's keys and values are rebuilt, then attention is the
// ordinary one. Works through a sequence in chunks of kChunkTokens tokens:
//
//     decode    the chunk's latents and rope keys, once for all heads     tasks: pages
//     attend    rebuild the chunk's keys and values, then a flash step    tasks: heads
//
// Memory: one decoded chunk, and the queries and running sums of kQueryRows / H tokens.
#include <cmath>

#include "cpu/call.h"
#include "cpu/error.h"
#include "cpu/half.h"

namespace mla::cpu {
namespace {

constexpr int64_t kQueryRows = 32768;  // rows (head x token) at a time
constexpr int64_t kMinQueries = 512;

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

class Expanded {
  public:
    Expanded(const Call& call, int64_t b) : call_(call), weights_(*call.params->weights), b_(b) {
        bf16_ = call.kernels->has_bf16 && !weights_.exact();
        pair_ = bf16_ ? 2 : 1;
        element_ = bf16_ ? 2 : 4;
        rope_padded_ = round_up(call.dims.rope, 32);
        key_ = weights_.nope_padded + rope_padded_;
        ready_ = head_weights_ready(weights_, bf16_);
    }

    Status run() {
        const int64_t fresh = call_.fresh(b_), heads = call_.dims.heads;
        int64_t block = kQueryRows / heads;
        if (block < kMinQueries) block = kMinQueries;
        if (block > fresh) block = fresh;
        queries_padded_ = round_up(static_cast<int>(block), 16);
        Carver measure(nullptr);
        lay_out(measure);
        if (!call_.params->workspace->reserve(measure.used()))
            return fail(Status::kOutOfMemory, "out of memory for a workspace of %zu bytes",
                        measure.used());
        Carver carver(call_.params->workspace->memory);
        lay_out(carver);
        if (!ready_)
            parallel(heads, [&](int64_t h) {
                expand_head_weights(weights_, static_cast<int>(h), bf16_, head_uk(h), head_uv(h));
            });
        for (int64_t s = 0; s < fresh; s += block)
            run_queries(s, static_cast<int>(fresh - s < block ? fresh - s : block));
        return Status::kOk;
    }

  private:
    template <class Body>
    void parallel(int64_t count, const Body& body) const {
        parallel_for(call_.params->parallel, count, body);
    }

    void lay_out(Carver& carver) {
        const int64_t heads = call_.dims.heads, queries = queries_padded_;
        q_ = carver.take<uint8_t>(heads * queries * key_ * element_);
        o_ = carver.take<float>(heads * queries * weights_.v_padded);
        max_ = carver.take<float>(heads * queries);
        sum_ = carver.take<float>(heads * queries);
        c_rows_ = carver.take<uint8_t>(int64_t{kChunkTokens} * weights_.rank_padded * element_);
        c_columns_ = carver.take<uint8_t>(int64_t{kChunkStride} * weights_.rank_padded * element_);
        pe_columns_ = carver.take<uint8_t>(int64_t{kChunkStride} * rope_padded_ * element_);
        if (!ready_) {
            w_uk_ = carver.take<uint8_t>(heads * weights_.nope_padded * weights_.rank_padded *
                                         int64_t{element_});
            w_uv_ = carver.take<uint8_t>(heads * weights_.v_padded * weights_.rank_padded *
                                         int64_t{element_});
        }
        HeadTask shape = head_shape();
        slot_bytes_ = call_.kernels->head_scratch(shape);
        const size_t chunk_bytes = call_.kernels->chunk_scratch(call_.record);
        if (slot_bytes_ < chunk_bytes) slot_bytes_ = chunk_bytes;
        slot_bytes_ = align_up(slot_bytes_);
        slots_ = carver.take<uint8_t>(static_cast<int64_t>(slot_bytes_) *
                                      ScratchPool::slots_for(call_.params->parallel));
    }

    HeadTask head_shape() const {
        HeadTask task = {};
        task.dims = call_.dims;
        task.nope_padded = weights_.nope_padded;
        task.rank_padded = weights_.rank_padded;
        task.rope_padded = rope_padded_;
        task.v_padded = weights_.v_padded;
        task.bf16 = bf16_;
        return task;
    }

    uint8_t* head_uk(int64_t h) const {
        return w_uk_ + h * weights_.nope_padded * weights_.rank_padded * element_;
    }
    uint8_t* head_uv(int64_t h) const {
        return w_uv_ + h * weights_.v_padded * weights_.rank_padded * element_;
    }

    void run_queries(int64_t first, int queries) {
        ScratchPool pool(slots_, slot_bytes_, ScratchPool::slots_for(call_.params->parallel));
        const int64_t past = call_.past(b_) + first, tokens = past + queries;
        parallel(call_.dims.heads, [&](int64_t h) { load_queries(h, first, queries); });
        for (int64_t begin = 0; begin < tokens; begin += kChunkTokens) {
            const int64_t left = tokens - begin;
            const int64_t pages =
                ((left < kChunkTokens ? left : kChunkTokens) + kPageTokens - 1) / kPageTokens;
            parallel(pages, [&](int64_t i) {
                Scratch scratch(pool, i);
                decode(begin, i, scratch.memory());
            });
            parallel(call_.dims.heads, [&](int64_t h) {
                Scratch scratch(pool, h);
                attend(h, begin, static_cast<int>(pages) * kPageTokens, past, queries,
                       scratch.memory());
            });
        }
        parallel(call_.dims.heads, [&](int64_t h) { store_output(h, first, queries); });
    }

    void put(uint8_t* row, int64_t index, float x) const {
        if (bf16_)
            reinterpret_cast<uint16_t*>(row)[index] = float_to_bf16(x);
        else
            reinterpret_cast<float*>(row)[index] = x;
    }

    void load_queries(int64_t h, int64_t first, int queries) const {
        const AttentionDims& d = call_.dims;
        const float scale = call_.params->softmax_scale * kLog2E;
        for (int i = 0; i < queries_padded_; ++i) {
            uint8_t* row = q_ + (h * queries_padded_ + i) * key_ * element_;
            for (int k = 0; k < key_; ++k) put(row, k, 0.0f);
            max_[h * queries_padded_ + i] = kNothingSeen;
            sum_[h * queries_padded_ + i] = 0;
            float* o = o_ + (h * queries_padded_ + i) * weights_.v_padded;
            for (int v = 0; v < weights_.v_padded; ++v) o[v] = 0;
            if (i >= queries) continue;
            const float* q = call_.q(b_, first + i, static_cast<int>(h));
            float rotated[128];
            rotate(q + d.nope, call_.cos(b_, first + i), call_.sin(b_, first + i), d.rope, scale,
                   rotated);
            for (int n = 0; n < d.nope; ++n) put(row, n, q[n] * scale);
            for (int k = 0; k < d.rope; ++k) put(row, weights_.nope_padded + k, rotated[k]);
        }
    }

    void decode(int64_t begin, int64_t page, uint8_t* scratch) const {
        ChunkTask task = {};
        task.record = &call_.record;
        task.pages = call_.pages(b_);
        task.page = begin / kPageTokens + page;
        task.length = call_.past(b_) + call_.fresh(b_);
        task.rank_padded = weights_.rank_padded;
        task.rope_padded = rope_padded_;
        task.bf16 = bf16_;
        const int64_t token = page * kPageTokens;
        task.c_rows = c_rows_ + token * weights_.rank_padded * element_;
        task.c_columns = c_columns_ + token * pair_ * element_;
        task.pe_columns = pe_columns_ + token * pair_ * element_;
        task.scratch = scratch;
        call_.kernels->decode_chunk(task);
    }

    void attend(int64_t h, int64_t begin, int tokens, int64_t past, int queries,
                uint8_t* scratch) const {
        HeadTask task = head_shape();
        task.w_uk = ready_ ? weights_.head_uk(static_cast<int>(h)) : head_uk(h);
        task.w_uv = ready_ ? weights_.head_uv(static_cast<int>(h)) : head_uv(h);
        task.c_rows = c_rows_;
        task.c_columns = c_columns_;
        task.pe_columns = pe_columns_;
        task.chunk_begin = begin;
        task.chunk_tokens = tokens;
        task.past = past;
        task.queries = queries;
        task.q = q_ + h * queries_padded_ * key_ * element_;
        task.max = max_ + h * queries_padded_;
        task.sum = sum_ + h * queries_padded_;
        task.o = o_ + h * queries_padded_ * weights_.v_padded;
        task.scratch = scratch;
        call_.kernels->attend_head(task);
    }

    void store_output(int64_t h, int64_t first, int queries) const {
        for (int i = 0; i < queries; ++i) {
            const float inverse = 1.0f / sum_[h * queries_padded_ + i];
            const float* o = o_ + (h * queries_padded_ + i) * weights_.v_padded;
            float* output = call_.output(b_, first + i, static_cast<int>(h));
            for (int v = 0; v < call_.dims.v; ++v) output[v] = o[v] * inverse;
        }
    }

    const Call& call_;
    const PreparedWeights& weights_;
    const int64_t b_;
    bool bf16_, ready_;
    int pair_, rope_padded_, key_;
    int64_t element_;
    int queries_padded_ = 0;
    uint8_t *q_ = nullptr, *c_rows_ = nullptr, *c_columns_ = nullptr, *pe_columns_ = nullptr;
    uint8_t *w_uk_ = nullptr, *w_uv_ = nullptr, *slots_ = nullptr;
    float *o_ = nullptr, *max_ = nullptr, *sum_ = nullptr;
    size_t slot_bytes_ = 0;
};

}  // namespace

Status attend_expanded(const Call& call, int64_t sequence) {
    return Expanded(call, sequence).run();
}

}  // namespace mla::cpu
