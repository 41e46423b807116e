// The kernels in scalar fp32: no quantised query, no blocking, nothing clever. Correct on every
// CPU, and what the instruction sets are tested against.
#include <cmath>

#include "cpu/half.h"
#include "cpu/kernels.h"

namespace mla::cpu {
namespace {

// ---- encode ---------------------------------------------------------------------------------

constexpr int kLanes = 16;

// Sums as sixteen lanes, then by halves: the order that every instruction set follows, so that all
// write the same bytes.
template <class Value>
float lane_sum(int count, const Value& value) {
    float lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i % kLanes] += value(i);
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

float inverse_of(float scale) { return scale > kTiny ? 1.0f / scale : 0.0f; }

float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }

float nearest_code(float x, float zero, float inverse) {
    return clamp(std::nearbyint((x - zero) * inverse), 0, kLevels);
}

// Section solve_affine_int4 of quant/latent_cache.py, for one group.
void solve_group(const float* x, int size, uint8_t* codes, uint16_t* scale_bits,
                 uint16_t* zero_bits) {
    const float count = static_cast<float>(size);
    float low = x[0], high = x[0];
    for (int i = 1; i < size; ++i) {
        low = std::fmin(low, x[i]);
        high = std::fmax(high, x[i]);
    }
    const float mean = lane_sum(size, [&](int i) { return x[i]; }) / count;
    float scale = (high - low) / kLevels, zero = low, code_mean = 0;
    for (int round = 0; round < kRounds; ++round) {
        const float inverse = inverse_of(scale);
        const auto code = [&](int i) { return nearest_code(x[i], zero, inverse); };
        code_mean = lane_sum(size, code) / count;
        const float spread = lane_sum(size, [&](int i) {
            const float centred = code(i) - code_mean;
            return centred * centred;
        });
        const float product =
            lane_sum(size, [&](int i) { return (code(i) - code_mean) * (x[i] - mean); });
        if (spread > 0) scale = product / std::fmax(spread, 1e-6f);
        zero = mean - scale * code_mean;
    }
    *scale_bits = float_to_half(scale);
    scale = half_to_float(*scale_bits);
    *zero_bits = float_to_half(mean - scale * code_mean);
    zero = half_to_float(*zero_bits);
    const float inverse = inverse_of(scale);
    for (int i = 0; i < size; ++i)
        codes[i] = static_cast<uint8_t>(nearest_code(x[i], zero, inverse));
}

// Section encode_symmetric_int8, for one group; stores into a BLOCKED part.
void encode_symmetric(const float* x, int first, int size, int width, int slot, uint8_t* part,
                      uint16_t* scale_bits) {
    float largest = 0;
    for (int i = 0; i < size; ++i) largest = std::fmax(largest, std::fabs(x[first + i]));
    *scale_bits = float_to_half(largest / 127);
    const float inverse = inverse_of(half_to_float(*scale_bits));
    for (int i = 0; i < size; ++i) {
        const float code = clamp(std::nearbyint(x[first + i] * inverse), -127, 127);
        part[blocked_offset(width, slot, first + i)] =
            static_cast<uint8_t>(static_cast<int8_t>(code));
    }
}

void store_token(const Record& record, const PageView& page, int slot, const float* c,
                 const float* k_pe) {
    if (record.is_float()) {
        const bool half = record.format == CacheFormat::kFp16;
        const auto store = [&](void* rows, const float* x, int width) {
            for (int i = 0; i < width; ++i) {
                const int64_t at = static_cast<int64_t>(slot) * width + i;
                if (half)
                    static_cast<uint16_t*>(rows)[at] = float_to_half(x[i]);
                else
                    static_cast<float*>(rows)[at] = x[i];
            }
        };
        store(page.c_rows, c, record.rank);
        store(page.pe_rows, k_pe, record.rope);
        return;
    }
    for (int g = 0; g < record.groups; ++g) {
        const int first = g * record.group;
        uint16_t* scale = page.scale + g * kPageTokens + slot;
        if (record.format == CacheFormat::kInt8) {
            encode_symmetric(c, first, record.group, record.rank, slot, page.codes, scale);
            continue;
        }
        uint8_t codes[64];
        solve_group(c + first, record.group, codes, scale, page.zero + g * kPageTokens + slot);
        for (int i = 0; i < record.group; i += 8)
            for (int j = 0; j < 4; ++j)
                page.codes[blocked_offset(record.rank / 2, slot, (first + i) / 2 + j)] =
                    static_cast<uint8_t>(codes[i + j] | codes[i + 4 + j] << 4);
    }
    for (int g = 0; g < record.rope_groups; ++g)
        encode_symmetric(k_pe, g * record.rope_group, record.rope_group, record.rope, slot,
                         reinterpret_cast<uint8_t*>(page.pe_codes),
                         page.pe_scale + g * kPageTokens + slot);
}

void encode(const EncodeTask& task) {
    const Record& record = *task.record;
    float c[1024], k_pe[128];
    for (int t = 0; t < task.tokens; ++t) {
        const float* kv = task.kv + t * task.kv_stride;
        float norm = 1;
        if (task.epsilon >= 0) {
            const float square =
                lane_sum(record.rank, [&](int i) { return kv[i] * kv[i]; }) / record.rank;
            norm = 1.0f / std::sqrt(square + task.epsilon);
        }
        for (int i = 0; i < record.rank; ++i) c[i] = kv[i] * norm;
        const float* cos = task.cos + t * (record.rope / 2);
        const float* sin = task.sin + t * (record.rope / 2);
        for (int i = 0; i < record.rope / 2; ++i) {
            const float even = kv[record.rank + 2 * i], odd = kv[record.rank + 2 * i + 1];
            k_pe[2 * i] = even * cos[i] - odd * sin[i];
            k_pe[2 * i + 1] = even * sin[i] + odd * cos[i];
        }
        const int64_t position = task.position + t;
        const PageView page = view_page(record, task.pages[position / kPageTokens]);
        store_token(record, page, static_cast<int>(position % kPageTokens), c, k_pe);
    }
}

// ---- decode ---------------------------------------------------------------------------------

void load_token(const Record& record, const PageView& page, int slot, float* c, float* k_pe) {
    if (record.is_float()) {
        const bool half = record.format == CacheFormat::kFp16;
        const auto load = [&](const void* rows, float* x, int width) {
            for (int i = 0; i < width; ++i) {
                const int64_t at = static_cast<int64_t>(slot) * width + i;
                x[i] = half ? half_to_float(static_cast<const uint16_t*>(rows)[at])
                            : static_cast<const float*>(rows)[at];
            }
        };
        load(page.c_rows, c, record.rank);
        load(page.pe_rows, k_pe, record.rope);
        return;
    }
    for (int i = 0; i < record.rank; ++i) {
        const int at = i / record.group * kPageTokens + slot;
        const float scale = half_to_float(page.scale[at]);
        if (record.format == CacheFormat::kInt8) {
            c[i] = scale * static_cast<int8_t>(page.codes[blocked_offset(record.rank, slot, i)]);
            continue;
        }
        const int byte = page.codes[blocked_offset(record.rank / 2, slot, i / 8 * 4 + i % 4)];
        const int code = i % 8 < 4 ? byte & 15 : byte >> 4;
        c[i] = scale * static_cast<float>(code) + half_to_float(page.zero[at]);
    }
    for (int i = 0; i < record.rope; ++i)
        k_pe[i] = half_to_float(page.pe_scale[i / record.rope_group * kPageTokens + slot]) *
                  page.pe_codes[blocked_offset(record.rope, slot, i)];
}

float dot(const float* a, const float* b, int count) {
    float sum = 0;
    for (int i = 0; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

// ---- absorbed -------------------------------------------------------------------------------

float weight(const MatmulTask& task, int row, int column) {
    const int64_t at = row * task.stride + column;
    switch (task.layout) {
        case WeightLayout::kRowsFp32:
            return static_cast<const float*>(task.w)[at];
        case WeightLayout::kRowsBf16:
            return bf16_to_float(static_cast<const uint16_t*>(task.w)[at]);
        case WeightLayout::kPairsBf16:
            return bf16_to_float(static_cast<const uint16_t*>(
                task.w)[(row / 2 * task.stride + column) * 2 + row % 2]);
        default:
            return static_cast<const int8_t*>(task.w)[at] * task.scale[column];
    }
}

void matmul(const MatmulTask& task) {
    for (int r = 0; r < task.rows; ++r) {
        for (int c = 0; c < task.n; ++c) task.out[r][c] = 0;
        for (int i = 0; i < task.k; ++i)
            for (int c = 0; c < task.n; ++c) task.out[r][c] += task.x[r][i] * weight(task, i, c);
    }
}

// One step of the online softmax: the factor for the old sum and the weight of the new token.
struct Step {
    float keep, add;
};

Step online_step(float score, float* max, float* sum) {
    const float top = std::fmax(*max, score);
    const Step step = {std::exp2(*max - top), std::exp2(score - top)};
    *max = top;
    *sum = *sum * step.keep + step.add;
    return step;
}

size_t attend_scratch(const Record&, int) { return 0; }

void attend(const AttendTask& task) {
    const Record& record = *task.record;
    for (int r = 0; r < task.rows; ++r) {
        task.max[r] = kNothingSeen;
        task.sum[r] = 0;
        for (int i = 0; i < record.rank; ++i) task.o[r * record.rank + i] = 0;
    }
    float c[1024], k_pe[128];
    for (int64_t page = task.page_begin; page < task.page_end; ++page) {
        const PageView view = view_page(record, task.pages[page]);
        for (int slot = 0; slot < kPageTokens; ++slot) {
            const int64_t token = page * kPageTokens + slot;
            if (token >= task.length) break;
            load_token(record, view, slot, c, k_pe);
            for (int r = 0; r < task.rows; ++r) {
                if (token >= task.visible[r]) continue;
                const float score = dot(task.q_latent + r * record.rank, c, record.rank) +
                                    dot(task.q_pe + r * record.rope, k_pe, record.rope);
                const Step step = online_step(score, &task.max[r], &task.sum[r]);
                float* o = task.o + static_cast<int64_t>(r) * record.rank;
                for (int i = 0; i < record.rank; ++i) o[i] = o[i] * step.keep + step.add * c[i];
            }
        }
    }
}

// ---- expanded -------------------------------------------------------------------------------

size_t chunk_scratch(const Record&) { return 0; }

// fp32 only: has_bf16 is false.
void decode_chunk(const ChunkTask& task) {
    const Record& record = *task.record;
    const PageView view = view_page(record, task.pages[task.page]);
    float c[1024] = {}, k_pe[128] = {};
    for (int slot = 0; slot < kPageTokens; ++slot) {
        const bool real = task.page * kPageTokens + slot < task.length;
        if (real) load_token(record, view, slot, c, k_pe);
        float* row = static_cast<float*>(task.c_rows) + slot * task.rank_padded;
        for (int i = 0; i < task.rank_padded; ++i) row[i] = real && i < record.rank ? c[i] : 0;
        for (int i = 0; i < task.rope_padded; ++i)
            static_cast<float*>(task.pe_columns)[i * kChunkStride + slot] =
                real && i < record.rope ? k_pe[i] : 0;
    }
}

size_t head_scratch(const HeadTask& task) {
    return sizeof(float) * (task.nope_padded + task.v_padded);
}

void attend_head(const HeadTask& task) {
    const AttentionDims& d = task.dims;
    const float* w_uk = static_cast<const float*>(task.w_uk);
    const float* w_uv = static_cast<const float*>(task.w_uv);
    const float* pe = static_cast<const float*>(task.pe_columns);
    float* k_nope = reinterpret_cast<float*>(task.scratch);
    float* value = k_nope + task.nope_padded;
    const int key = task.nope_padded + task.rope_padded;
    for (int t = 0; t < task.chunk_tokens; ++t) {
        const int64_t token = task.chunk_begin + t;
        if (token >= task.past + task.queries) break;
        const float* c = static_cast<const float*>(task.c_rows) + t * task.rank_padded;
        for (int n = 0; n < d.nope; ++n) k_nope[n] = dot(w_uk + n * task.rank_padded, c, d.rank);
        for (int v = 0; v < d.v; ++v) value[v] = 0;
        for (int i = 0; i < d.rank; ++i)
            for (int v = 0; v < d.v; ++v) value[v] += c[i] * w_uv[i * task.v_padded + v];
        for (int s = 0; s < task.queries; ++s) {
            if (token > task.past + s) continue;
            const float* q = static_cast<const float*>(task.q) + static_cast<int64_t>(s) * key;
            float score = dot(q, k_nope, d.nope);
            for (int i = 0; i < d.rope; ++i)
                score += q[task.nope_padded + i] * pe[i * kChunkStride + t];
            const Step step = online_step(score, &task.max[s], &task.sum[s]);
            float* o = task.o + static_cast<int64_t>(s) * task.v_padded;
            for (int v = 0; v < d.v; ++v) o[v] = o[v] * step.keep + step.add * value[v];
        }
    }
}

}  // namespace

const KernelTable* portable_kernels() {
    static const KernelTable table = {false,
                                      1,
                                      1,
                                      1,
                                      1,
                                      encode,
                                      matmul,
                                      attend_scratch,
                                      attend,
                                      chunk_scratch,
                                      decode_chunk,
                                      head_scratch,
                                      attend_head};
    return &table;
}

}  // namespace mla::cpu
