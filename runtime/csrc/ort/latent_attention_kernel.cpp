#include "ort/latent_attention_kernel.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>

namespace mla::ort {

namespace {

void check_kernel(cpu::Status status) {
    if (status == cpu::Status::kOk) return;
    throw Error(status == cpu::Status::kBadArgument ? ORT_INVALID_ARGUMENT : ORT_FAIL,
                cpu::last_error());
}

// Workspaces that no call is using. The layers of a model run one after the other, so a few serve
// them all; a kernel that owned one would multiply the memory by the number of layers.
class Workspaces {
  public:
    struct GiveBack {
        void operator()(cpu::Workspace* workspace) const { workspaces().give_back(workspace); }
    };
    using Lent = std::unique_ptr<cpu::Workspace, GiveBack>;

    static Workspaces& workspaces() {
        static Workspaces instance;
        return instance;
    }

    Lent take() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!free_.empty()) {
                Lent lent(free_.back());
                free_.pop_back();
                return lent;
            }
            free_.reserve(++made_);  // so that giving back never allocates
        }
        Lent lent(cpu::create_workspace());
        if (lent == nullptr) throw std::bad_alloc();
        return lent;
    }

    ~Workspaces() {
        for (cpu::Workspace* workspace : free_) cpu::free_workspace(workspace);
    }

  private:
    void give_back(cpu::Workspace* workspace) {
        const std::lock_guard<std::mutex> lock(mutex_);
        free_.push_back(workspace);
    }

    std::mutex mutex_;
    std::vector<cpu::Workspace*> free_;
    size_t made_ = 0;
};

// ONNX Runtime's thread pool behind the interface of the kernels.
class Threads {
  public:
    Threads(const OrtApi& api, const OrtKernelContext* context) : api_(api), context_(context) {}

    cpu::ParallelFor parallel_for() {
        // The pool does not tell its size. To cut the work for more threads than it has costs
        // little; to cut it for fewer leaves some idle.
        const unsigned count = std::max(1u, std::thread::hardware_concurrency());
        return {this, static_cast<int>(count), &Threads::run};
    }

  private:
    struct Job {
        void (*task)(void*, int64_t);
        void* argument;
    };

    static void run(void* context, int64_t count, void (*task)(void*, int64_t), void* argument) {
        const Threads& self = *static_cast<Threads*>(context);
        Job job{task, argument};
        const auto call = [](void* data, size_t index) {
            const Job& job = *static_cast<Job*>(data);
            job.task(job.argument, static_cast<int64_t>(index));
        };
        // No batches: an idle thread takes the next task, and tasks differ in length.
        OrtStatus* status = self.api_.KernelContext_ParallelFor(
            self.context_, call, static_cast<size_t>(count), 0, &job);
        if (status == nullptr) return;
        // Refused before a task has started; the work is due all the same.
        self.api_.ReleaseStatus(status);
        for (int64_t i = 0; i < count; ++i) task(argument, i);
    }

    const OrtApi& api_;
    const OrtKernelContext* context_;
};

cpu::ElementType element_type(const Tensor& weight) {
    return weight.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? cpu::ElementType::kFp16
                                                                : cpu::ElementType::kFp32;
}

// A cache in float32 is for comparing with. With one in int4 the latents' own error is twenty times
// that of weights in 8 bit, which a decode step reads in half the time.
cpu::WeightPrecision precision_for(cpu::CacheFormat format) {
    switch (format) {
        case cpu::CacheFormat::kFp32:
            return cpu::WeightPrecision::kFp32;
        case cpu::CacheFormat::kInt4:
            return cpu::WeightPrecision::kInt8;
        default:
            return cpu::WeightPrecision::kBf16;
    }
}

// The cache of the outputs, holding what that of the inputs holds. Where the caller bound one value
// as both, they are one memory, and nothing is copied.
cpu::CacheArena present_cache(const OrtApi& api, OrtKernelContext* context,
                              const Attributes& attributes, const Operands& operands,
                              const std::vector<Part>& parts) {
    cpu::CacheArena arena;
    arena.format = attributes.cache_format;
    arena.pages = operands.pages;
    for (size_t i = 0; i < parts.size(); ++i) {
        const Tensor& past = operands.cache[i];
        const Tensor present = output(api, context, 1 + i, past);
        if (present.data != past.data) {
            const size_t bytes = static_cast<size_t>(past.elements()) * parts[i].element_bytes;
            std::memcpy(present.data, past.data, bytes);
        }
        arena.parts[i] = present.data;
    }
    return arena;
}

}  // namespace

LatentAttentionKernel::LatentAttentionKernel(const OrtApi& api, const OrtKernelInfo* info)
    : api(api),
      attributes_(read_attributes(api, info)),
      parts_(cache_parts(attributes_)),
      weights_(nullptr, cpu::free_weights) {
    check_types(api, info, parts_, Activations::kFp32);
    check_kernel(cpu::resolve_isa(cpu::Isa::kAuto, &isa_));
    const OrtValue* w_uk = constant_input(api, info, kWUk);
    const OrtValue* w_uv = constant_input(api, info, kWUv);
    if (w_uk != nullptr && w_uv != nullptr) {
        weights_ = prepare(view(api, *w_uk), view(api, *w_uv));
    }
}

void LatentAttentionKernel::compute(OrtKernelContext* context) const {
    const Operands operands = read_operands(api, context, attributes_, parts_);
    const auto data = [&](Input index) { return operands.inputs[index].as<const float>(); };
    const auto integers = [&](Input index) { return operands.inputs[index].as<const int64_t>(); };

    Tensor result = operands.inputs[kQ];
    result.shape[2] = int64_t{attributes_.dims.heads} * attributes_.dims.v;
    result = output(api, context, 0, result);

    cpu::LatentAttentionParams params;
    params.batch = operands.batch;
    params.steps = operands.steps;
    params.table_pages = operands.pages_per_sequence;
    params.q = data(kQ);
    params.kv = data(kKv);
    params.cos = data(kCos);
    params.sin = data(kSin);
    params.output = result.as<float>();
    params.cache = present_cache(api, context, attributes_, operands, parts_);
    params.block_table = integers(kBlockTable);
    params.past_lengths = integers(kPastLengths);
    params.new_lengths = integers(kNewLengths);
    params.softmax_scale = attributes_.softmax_scale;
    params.latent_norm_epsilon = attributes_.latent_norm_epsilon;
    params.mode = attributes_.mode;
    params.isa = isa_;

    const Weights prepared = weights_ == nullptr
                                 ? prepare(operands.inputs[kWUk], operands.inputs[kWUv])
                                 : Weights(nullptr, cpu::free_weights);
    params.weights = weights_ == nullptr ? prepared.get() : weights_.get();
    Threads threads(api, context);
    params.parallel = threads.parallel_for();
    const Workspaces::Lent workspace = Workspaces::workspaces().take();
    params.workspace = workspace.get();
    check_kernel(cpu::latent_attention(params));
}

LatentAttentionKernel::Weights LatentAttentionKernel::prepare(const Tensor& w_uk,
                                                              const Tensor& w_uv) const {
    cpu::WeightsDesc desc;
    desc.dims = attributes_.dims;
    desc.type = element_type(w_uk);
    desc.w_uk = w_uk.data;
    desc.w_uv = w_uv.data;
    desc.precision = precision_for(attributes_.cache_format);
    cpu::PreparedWeights* weights = nullptr;
    check_kernel(cpu::prepare_weights(desc, &weights));
    return Weights(weights, cpu::free_weights);
}

}  // namespace mla::ort
