#include "cpu/weights.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/error.h"
#include "cpu/half.h"
#include "cpu/workspace.h"

namespace mla::cpu {
namespace {

int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

float element(const void* data, ElementType type, int64_t index) {
    if (type == ElementType::kFp32) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return type == ElementType::kFp16 ? half_to_float(bits) : bf16_to_float(bits);
}

// Where element (row, column) of a padded head matrix lies.
int64_t place(bool pairs, int row, int column, int stride) {
    if (!pairs) return static_cast<int64_t>(row) * stride + column;
    return (static_cast<int64_t>(row / 2) * stride + column) * 2 + row % 2;
}

// One head of one matrix [rows, columns] into its padded place.
void prepare_head(const void* source, ElementType type, int64_t first, int rows, int columns,
                  WeightPrecision precision, bool pairs, int stride, void* target, float* scale) {
    if (precision == WeightPrecision::kInt8) {
        for (int c = 0; c < columns; ++c) {
            float largest = 0;
            for (int r = 0; r < rows; ++r)
                largest = std::fmax(
                    largest, std::fabs(element(source, type, first + int64_t{r} * columns + c)));
            scale[c] = largest / 127;
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int c = 0; c < columns; ++c) {
            const float x = element(source, type, first + static_cast<int64_t>(r) * columns + c);
            const int64_t at = place(pairs, r, c, stride);
            if (precision == WeightPrecision::kFp32)
                static_cast<float*>(target)[at] = x;
            else if (precision == WeightPrecision::kBf16)
                static_cast<uint16_t*>(target)[at] = float_to_bf16(x);
            else
                static_cast<int8_t*>(target)[at] =
                    static_cast<int8_t>(scale[c] > kTiny ? std::nearbyint(x / scale[c]) : 0.0f);
        }
    }
}

Status check(const WeightsDesc& desc) {
    const AttentionDims& d = desc.dims;
    if (d.heads < 1 || d.heads > 128)
        return fail(Status::kBadArgument, "heads is %d; allowed: 1 to 128", d.heads);
    if (d.nope < 1 || d.nope > 1024)
        return fail(Status::kBadArgument, "qk_nope_head_dim is %d; allowed: 1 to 1024", d.nope);
    if (d.v < 1 || d.v > 1024)
        return fail(Status::kBadArgument, "v_head_dim is %d; allowed: 1 to 1024", d.v);
    PartInfo parts[kMaxParts];
    int count = 0;
    if (const Status s = cache_parts(CacheFormat::kFp32, d.rank, d.rope, parts, &count);
        s != Status::kOk)
        return s;
    if (!desc.w_uk || !desc.w_uv)
        return fail(Status::kBadArgument, "w_uk or w_uv is null; both are required");
    const int type = static_cast<int>(desc.type), precision = static_cast<int>(desc.precision);
    if (type < 0 || type > 2)
        return fail(Status::kBadArgument, "unknown weight element type %d; allowed: 0 to 2", type);
    if (precision < 0 || precision > 2)
        return fail(Status::kBadArgument, "unknown weight precision %d; allowed: 0 to 2",
                    precision);
    return Status::kOk;
}

}  // namespace

Status prepare_weights(const WeightsDesc& desc, PreparedWeights** weights) {
    if (!weights) return fail(Status::kBadArgument, "prepare_weights: `weights` is null");
    *weights = nullptr;
    if (const Status s = check(desc); s != Status::kOk) return s;
    PreparedWeights* w = new (std::nothrow) PreparedWeights();
    if (!w) return fail(Status::kOutOfMemory, "out of memory for the attention weights");
    const AttentionDims& d = w->dims = desc.dims;
    w->precision = desc.precision;
    w->nope_padded = round_up(d.nope, 32);
    w->rank_padded = round_up(d.rank, 32);
    w->v_padded = round_up(d.v, 16);
    const size_t heads = d.heads, rank = w->rank_padded;
    const size_t uk_bytes = w->element_bytes() * heads * w->nope_padded * rank;
    const size_t uv_bytes = w->element_bytes() * heads * w->v_padded * rank;
    const bool int8 = desc.precision == WeightPrecision::kInt8;
    const size_t uk_scales = int8 ? heads * rank * sizeof(float) : 0;
    const size_t uv_scales = int8 ? heads * w->v_padded * sizeof(float) : 0;
    w->bytes = uk_bytes + uv_bytes + uk_scales + uv_scales;
    w->w_uk = allocate(uk_bytes);
    w->w_uv = allocate(uv_bytes);
    w->uk_scale = int8 ? static_cast<float*>(allocate(uk_scales)) : nullptr;
    w->uv_scale = int8 ? static_cast<float*>(allocate(uv_scales)) : nullptr;
    if (!w->w_uk || !w->w_uv || (int8 && (!w->uk_scale || !w->uv_scale))) {
        const size_t wanted = w->bytes;
        free_weights(w);
        return fail(Status::kOutOfMemory, "out of memory for %zu bytes of attention weights",
                    wanted);
    }
    std::memset(w->w_uk, 0, uk_bytes);
    std::memset(w->w_uv, 0, uv_bytes);
    if (int8) std::memset(w->uk_scale, 0, uk_scales);
    if (int8) std::memset(w->uv_scale, 0, uv_scales);
    const bool pairs = desc.precision == WeightPrecision::kBf16;
    for (int h = 0; h < d.heads; ++h) {
        prepare_head(desc.w_uk, desc.type, static_cast<int64_t>(h) * d.nope * d.rank, d.nope,
                     d.rank, desc.precision, false, w->rank_padded,
                     const_cast<void*>(w->head_uk(h)), int8 ? w->uk_scale + h * rank : nullptr);
        prepare_head(desc.w_uv, desc.type, static_cast<int64_t>(h) * d.rank * d.v, d.rank, d.v,
                     desc.precision, pairs, w->v_padded, const_cast<void*>(w->head_uv(h)),
                     int8 ? w->uv_scale + h * static_cast<size_t>(w->v_padded) : nullptr);
    }
    *weights = w;
    return Status::kOk;
}

void free_weights(PreparedWeights* weights) {
    if (!weights) return;
    std::free(weights->w_uk);
    std::free(weights->w_uv);
    std::free(weights->uk_scale);
    std::free(weights->uv_scale);
    delete weights;
}

size_t weights_bytes(const PreparedWeights* weights) { return weights ? weights->bytes : 0; }

namespace {

// One head's matrix in the elements and order of the expanded mode. Plain loops over rows, which
// the compiler turns into vectors.
template <class To, class Load, class Store>
void convert_rows(int rows, int stride, bool target_pairs, To* to, const Load& load,
                  const Store& store) {
    for (int r = 0; r < rows; ++r) {
        if (target_pairs) {
            To* row = to + static_cast<int64_t>(r / 2) * stride * 2 + r % 2;
            for (int c = 0; c < stride; ++c) row[2 * c] = store(load(r, c));
        } else {
            To* row = to + static_cast<int64_t>(r) * stride;
            for (int c = 0; c < stride; ++c) row[c] = store(load(r, c));
        }
    }
}

// `source`: int8 rows if there are scales, else bf16 rows or pairs.
void convert_matrix(const void* source, bool source_pairs, const float* scale, int rows, int stride,
                    bool bf16, bool target_pairs, void* target) {
    const auto convert = [&](auto* to, const auto& store) {
        const int64_t width = stride;
        const int8_t* codes = static_cast<const int8_t*>(source);
        const uint16_t* bits = static_cast<const uint16_t*>(source);
        const auto from_int8 = [=](int r, int c) { return codes[r * width + c] * scale[c]; };
        const auto from_rows = [=](int r, int c) { return bf16_to_float(bits[r * width + c]); };
        const auto from_pairs = [=](int r, int c) {
            return bf16_to_float(bits[(r / 2 * width + c) * 2 + r % 2]);
        };
        if (scale)
            convert_rows(rows, stride, target_pairs, to, from_int8, store);
        else if (source_pairs)
            convert_rows(rows, stride, target_pairs, to, from_pairs, store);
        else
            convert_rows(rows, stride, target_pairs, to, from_rows, store);
    };
    if (bf16)
        convert(static_cast<uint16_t*>(target), [](float x) { return float_to_bf16(x); });
    else
        convert(static_cast<float*>(target), [](float x) { return x; });
}

}  // namespace

void expand_head_weights(const PreparedWeights& w, int head, bool bf16, void* w_uk, void* w_uv) {
    const bool int8 = w.precision == WeightPrecision::kInt8;
    const size_t h = head;
    convert_matrix(w.head_uk(head), false, int8 ? w.uk_scale + h * w.rank_padded : nullptr,
                   w.nope_padded, w.rank_padded, bf16, false, w_uk);
    convert_matrix(w.head_uv(head), !int8, int8 ? w.uv_scale + h * w.v_padded : nullptr,
                   w.rank_padded, w.v_padded, bf16, bf16, w_uv);
}

}  // namespace mla::cpu
