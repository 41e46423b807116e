// mla::cpu::latent_attention on numpy arrays, for the tests and benchmarks of the kernels.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cpu/latent_attention.h"
#include "cpu/thread_pool.h"
#include "python/bindings.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace mla::cpu;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

void check(Status status) {
    if (status == Status::kOk) return;
    if (status == Status::kBadArgument) throw nb::value_error(last_error());
    throw std::runtime_error(last_error());
}

int choice(const std::string& value, std::initializer_list<const char*> allowed, const char* what) {
    std::string list;
    int index = 0;
    for (const char* name : allowed) {
        if (value == name) return index;
        list += (index++ ? ", " : "") + std::string(name);
    }
    throw nb::value_error(
        ("unknown " + std::string(what) + " '" + value + "'; allowed: " + list).c_str());
}

CacheFormat cache_format(const std::string& name) {
    return static_cast<CacheFormat>(choice(name, {"int4", "int8", "fp16", "fp32"}, "cache format"));
}

void expect_shape(const char* name, size_t ndim, const int64_t* shape,
                  std::initializer_list<int64_t> expected) {
    bool same = ndim == expected.size();
    size_t axis = 0;
    for (const int64_t size : expected) same = same && shape[axis++] == size;
    if (same) return;
    std::string text = std::string(name) + " has shape [";
    for (size_t i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    text += "]; expected [";
    axis = 0;
    for (const int64_t size : expected) text += (axis++ ? ", " : "") + std::to_string(size);
    throw nb::value_error((text + "]").c_str());
}

template <class Array>
void expect(const char* name, const Array& array, std::initializer_list<int64_t> expected) {
    expect_shape(name, array.ndim(), array.shape_ptr(), expected);
}

class Weights {
  public:
    Weights(const Bytes& w_uk, const Bytes& w_uv, int rope, const std::string& precision) {
        if (w_uk.ndim() != 3 || w_uv.ndim() != 3 || w_uk.dtype() != w_uv.dtype())
            throw nb::value_error("w_uk [H, N, rank] and w_uv [H, rank, V] must have one dtype");
        WeightsDesc desc;
        desc.dims = {static_cast<int>(w_uk.shape(0)), static_cast<int>(w_uk.shape(1)),
                     static_cast<int>(w_uk.shape(2)), rope, static_cast<int>(w_uv.shape(2))};
        expect("w_uv", w_uv, {desc.dims.heads, desc.dims.rank, desc.dims.v});
        if (w_uk.dtype() == nb::dtype<float>())
            desc.type = ElementType::kFp32;
        else if (w_uk.dtype() == nb::dtype<uint16_t>())
            desc.type = ElementType::kBf16;
        else if (w_uk.itemsize() == 2 &&
                 w_uk.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float))
            desc.type = ElementType::kFp16;
        else
            throw nb::value_error("weights must be float32, float16, or uint16 (bfloat16 bits)");
        desc.w_uk = w_uk.data();
        desc.w_uv = w_uv.data();
        desc.precision = static_cast<WeightPrecision>(
            choice(precision, {"fp32", "bf16", "int8"}, "weight precision"));
        dims_ = desc.dims;
        PreparedWeights* prepared = nullptr;
        check(prepare_weights(desc, &prepared));
        prepared_.reset(prepared);
    }

    const PreparedWeights* get() const { return prepared_.get(); }
    const AttentionDims& dims() const { return dims_; }
    size_t bytes() const { return weights_bytes(prepared_.get()); }

  private:
    struct Free {
        void operator()(PreparedWeights* weights) const { free_weights(weights); }
    };
    AttentionDims dims_;
    std::unique_ptr<PreparedWeights, Free> prepared_;
};

// A workspace and the threads that use it: one call at a time.
class Executor {
  public:
    explicit Executor(int threads) : pool_(threads), workspace_(create_workspace()) {
        if (!workspace_) throw std::bad_alloc();
    }
    ~Executor() { free_workspace(workspace_); }

    Status run(LatentAttentionParams params, bool append_only) {
        const std::lock_guard<std::mutex> lock(mutex_);
        params.parallel = pool_.parallel_for();
        params.workspace = workspace_;
        return append_only ? latent_append(params) : latent_attention(params);
    }
    size_t bytes() const { return workspace_bytes(workspace_); }

  private:
    std::mutex mutex_;
    ThreadPool pool_;
    Workspace* workspace_;
};

CacheArena arena(const nb::list& cache, const std::string& format, const AttentionDims& dims) {
    CacheArena arena;
    arena.format = cache_format(format);
    PartInfo parts[kMaxParts];
    int count = 0;
    check(cache_parts(arena.format, dims.rank, dims.rope, parts, &count));
    if (static_cast<int>(nb::len(cache)) != count)
        throw nb::value_error(
            ("a " + format + " cache has " + std::to_string(count) + " parts").c_str());
    for (int p = 0; p < count; ++p) {
        const auto part = nb::cast<nb::ndarray<nb::device::cpu>>(cache[p], false);
        const int64_t pages = part.ndim() ? static_cast<int64_t>(part.shape(0)) : 0;
        int64_t dense = 1;
        bool contiguous = true;
        for (size_t axis = part.ndim(); axis-- > 0;) {
            contiguous = contiguous && (part.shape(axis) == 1 || part.stride(axis) == dense);
            dense *= static_cast<int64_t>(part.shape(axis));
        }
        if (!contiguous || static_cast<int>(part.itemsize()) != parts[p].element_bytes ||
            static_cast<int64_t>(part.nbytes()) != pages * parts[p].page_bytes ||
            (p && pages != arena.pages))
            throw nb::value_error(
                ("cache part " + std::string(parts[p].name) +
                 " must be contiguous and hold the same number of whole pages as the others")
                    .c_str());
        arena.pages = pages;
        arena.parts[p] = part.data();
    }
    return arena;
}

void run(Executor& executor, const Floats& q, const Floats& kv, const Floats& cos,
         const Floats& sin, const Weights& weights, const Integers& block_table,
         const Integers& past_lengths, const Integers& new_lengths, const nb::list& cache,
         nb::ndarray<float, nb::c_contig, nb::device::cpu> output, const std::string& format,
         float softmax_scale, float latent_norm_epsilon, const std::string& mode,
         const std::string& isa, bool append_only) {
    const AttentionDims& d = weights.dims();
    LatentAttentionParams p;
    if (q.ndim() != 3) throw nb::value_error("q must have shape [B, S, H * (N + R)]");
    p.batch = static_cast<int64_t>(q.shape(0));
    p.steps = static_cast<int64_t>(q.shape(1));
    expect("q", q, {p.batch, p.steps, int64_t{d.heads} * (d.nope + d.rope)});
    expect("kv", kv, {p.batch, p.steps, d.rank + d.rope});
    expect("cos", cos, {p.batch, p.steps, d.rope / 2});
    expect("sin", sin, {p.batch, p.steps, d.rope / 2});
    if (block_table.ndim() != 2) throw nb::value_error("block_table must have shape [B, M]");
    p.table_pages = static_cast<int64_t>(block_table.shape(1));
    expect("block_table", block_table, {p.batch, p.table_pages});
    expect("past_lengths", past_lengths, {p.batch});
    expect("new_lengths", new_lengths, {p.batch});
    expect("output", output, {p.batch, p.steps, int64_t{d.heads} * d.v});
    p.q = q.data();
    p.kv = kv.data();
    p.cos = cos.data();
    p.sin = sin.data();
    p.output = output.data();
    p.weights = weights.get();
    p.cache = arena(cache, format, d);
    p.block_table = block_table.data();
    p.past_lengths = past_lengths.data();
    p.new_lengths = new_lengths.data();
    p.softmax_scale = softmax_scale;
    p.latent_norm_epsilon = latent_norm_epsilon;
    p.mode = static_cast<AttentionMode>(choice(mode, {"auto", "absorbed", "expanded"}, "mode"));
    check(parse_isa(isa.c_str(), &p.isa));
    Status status;
    std::string text;
    {
        nb::gil_scoped_release release;
        status = executor.run(p, append_only);
    }
    check(status);
}

}  // namespace

void bind_latent_attention(nb::module_& m) {
    m.def(
        "cpu_isas",
        [] {
            nb::list names;
            for (int i = 1; i <= static_cast<int>(Isa::kNeonI8mm); ++i) {
                Isa resolved;
                if (resolve_isa(static_cast<Isa>(i), &resolved) == Status::kOk)
                    names.append(isa_name(resolved));
            }
            return names;
        },
        nb::sig("def cpu_isas() -> list[str]"),
        "The instruction sets that latent attention can be told to use here, slowest first.");

    nb::class_<Weights>(m, "LatentAttentionWeights",
                        "w_uk [H, N, rank] and w_uv [H, rank, V] as the kernels hold them.")
        .def(nb::init<const Bytes&, const Bytes&, int, const std::string&>(), "w_uk"_a, "w_uv"_a,
             "qk_rope_head_dim"_a, "precision"_a = "bf16",
             nb::sig("def __init__(self, w_uk: object, w_uv: object, qk_rope_head_dim: int, "
                     "precision: str = 'bf16') -> None"),
             "Copies float32, float16 or uint16 (bfloat16 bits) arrays; precision: fp32 (exact "
             "kernels), bf16 or int8.")
        .def_prop_ro("nbytes", &Weights::bytes, "Bytes held.");

    nb::class_<Executor>(m, "LatentAttentionExecutor", "Threads and a workspace; keep and reuse.")
        .def(nb::init<int>(), "threads"_a = 1)
        .def_prop_ro("nbytes", &Executor::bytes, "Bytes of workspace held.");

    m.def("latent_attention", &run, "executor"_a, "q"_a, "kv"_a, "cos"_a, "sin"_a, "weights"_a,
          "block_table"_a, "past_lengths"_a, "new_lengths"_a, "cache"_a, "output"_a,
          "cache_format"_a, "softmax_scale"_a, "latent_norm_epsilon"_a = -1.0f, "mode"_a = "auto",
          "isa"_a = "auto", "append_only"_a = false,
          nb::sig("def latent_attention(executor: LatentAttentionExecutor, q: object, kv: object, "
                  "cos: object, sin: object, weights: LatentAttentionWeights, "
                  "block_table: object, past_lengths: object, new_lengths: object, "
                  "cache: list[object], output: object, cache_format: str, softmax_scale: float, "
                  "latent_norm_epsilon: float = -1.0, mode: str = 'auto', isa: str = 'auto', "
                  "append_only: bool = False) -> None"),
          "The native kernel on numpy arrays; shapes as torch.ops.mla_deploy.latent_attention.\n\n"
          "Writes the new tokens into `cache` and the attention into `output`, both in place.\n"
          "Raises ValueError for arguments that do not fit, RuntimeError for an instruction set\n"
          "that is unknown or missing. The GIL is released while it computes.");
}
