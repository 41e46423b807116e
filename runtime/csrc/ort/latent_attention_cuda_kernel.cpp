#include "ort/latent_attention_cuda_kernel.h"

#include <memory>

#include "mla_deploy/cuda.h"

namespace mla::ort {

namespace {

constexpr size_t kWorkspaceAlignment = 256;

void check(mla_cuda_status status) {
    if (status == MLA_CUDA_OK) return;
    throw Error(status == MLA_CUDA_BAD_ARGUMENT ? ORT_INVALID_ARGUMENT : ORT_FAIL,
                mla_cuda_last_error());
}

mla_cuda_cache cache_format(cpu::CacheFormat format) {
    switch (format) {
        case cpu::CacheFormat::kInt4:
            return MLA_CUDA_CACHE_INT4;
        case cpu::CacheFormat::kInt8:
            return MLA_CUDA_CACHE_INT8;
        case cpu::CacheFormat::kFp16:
            return MLA_CUDA_CACHE_FP16;
        default:
            throw invalid(
                "attribute cache_format is one that the CUDA kernels do not have; allowed are "
                "int4, int8, fp16: export the model with one of these, or run it on the CPU");
    }
}

mla_cuda_mode mode_of(cpu::AttentionMode mode) {
    return mode == cpu::AttentionMode::kAuto       ? MLA_CUDA_AUTO
           : mode == cpu::AttentionMode::kAbsorbed ? MLA_CUDA_ABSORBED
                                                   : MLA_CUDA_EXPANDED;
}

// What a node's calls have in common.
mla_cuda_attention call_of(const Attributes& attributes) {
    mla_cuda_attention call = {};
    call.size = sizeof call;
    call.heads = attributes.dims.heads;
    call.nope = attributes.dims.nope;
    call.rank = attributes.dims.rank;
    call.rope = attributes.dims.rope;
    call.v = attributes.dims.v;
    call.cache_format = cache_format(attributes.cache_format);
    call.mode = mode_of(attributes.mode);
    call.softmax_scale = attributes.softmax_scale;
    call.latent_norm_epsilon = attributes.latent_norm_epsilon;
    return call;
}

// Memory of ONNX Runtime's arena on the device, given back when the call has enqueued its work:
// whoever gets it next works on the same stream, and so after us.
class Workspace {
  public:
    Workspace(const OrtApi& api, const OrtKernelContext* context, size_t bytes)
        : memory_info_(nullptr, api.ReleaseMemoryInfo), allocator_(nullptr, api.ReleaseAllocator) {
        OrtMemoryInfo* info = nullptr;
        ort::check(api,
                   api.CreateMemoryInfo("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault, &info));
        memory_info_.reset(info);
        OrtAllocator* allocator = nullptr;
        ort::check(api, api.KernelContext_GetAllocator(context, info, &allocator));
        allocator_.reset(allocator);
        memory_ = allocator->Alloc(allocator, bytes);
        if (memory_ == nullptr)
            throw Error(ORT_FAIL, "the device has no " + std::to_string(bytes) +
                                      " bytes left for a workspace: use shorter prompts or fewer "
                                      "sequences at once");
    }
    ~Workspace() {
        if (memory_) allocator_->Free(allocator_.get(), memory_);
    }
    Workspace(const Workspace&) = delete;
    Workspace& operator=(const Workspace&) = delete;

    void* memory() const { return memory_; }

  private:
    std::unique_ptr<OrtMemoryInfo, decltype(OrtApi::ReleaseMemoryInfo)> memory_info_;
    std::unique_ptr<OrtAllocator, decltype(OrtApi::ReleaseAllocator)> allocator_;
    void* memory_ = nullptr;
};

}  // namespace

LatentAttentionCudaKernel::LatentAttentionCudaKernel(const OrtApi& api, const OrtKernelInfo* info)
    : api(api), attributes_(read_attributes(api, info)), parts_(cache_parts(attributes_)) {
    check_types(api, info, parts_, Activations::kFp16);
    check(mla_cuda_check_device());
    mla_cuda_attention smallest = call_of(attributes_);
    smallest.batch = smallest.steps = smallest.table_pages = smallest.pages = 1;
    check(mla_cuda_workspace_bytes(&smallest, &smallest.workspace_bytes));
}

void LatentAttentionCudaKernel::compute(OrtKernelContext* context) const {
    const Operands operands = read_operands(api, context, attributes_, parts_);
    const auto data = [&](Input index) { return operands.inputs[index].data; };
    void* stream = nullptr;
    ort::check(api, api.KernelContext_GetGPUComputeStream(context, &stream));

    Tensor result = operands.inputs[kQ];
    result.shape[2] = int64_t{attributes_.dims.heads} * attributes_.dims.v;
    result = output(api, context, 0, result);

    mla_cuda_attention call = call_of(attributes_);
    call.batch = operands.batch;
    call.steps = operands.steps;
    call.table_pages = operands.pages_per_sequence;
    call.q = {data(kQ), MLA_CUDA_FP16, 0};
    call.kv = {data(kKv), MLA_CUDA_FP16, 0};
    call.output = {result.data, MLA_CUDA_FP16, 0};
    call.cos = operands.inputs[kCos].as<const float>();
    call.sin = operands.inputs[kSin].as<const float>();
    call.w_uk = data(kWUk);
    call.w_uv = data(kWUv);
    call.block_table = operands.inputs[kBlockTable].as<const int64_t>();
    call.past_lengths = operands.inputs[kPastLengths].as<const int64_t>();
    call.new_lengths = operands.inputs[kNewLengths].as<const int64_t>();
    call.pages = operands.pages;
    for (size_t i = 0; i < parts_.size(); ++i) {
        const Tensor& past = operands.cache[i];
        const Tensor present = output(api, context, 1 + i, past);
        call.cache[i] = present.data;
        if (present.data == past.data) continue;  // the caller bound one value as both
        const size_t bytes = static_cast<size_t>(past.elements()) * parts_[i].element_bytes;
        check(mla_cuda_copy(present.data, past.data, bytes, stream));
    }
    check(mla_cuda_workspace_bytes(&call, &call.workspace_bytes));
    const Workspace workspace(api, context, call.workspace_bytes + kWorkspaceAlignment);
    const uintptr_t start = reinterpret_cast<uintptr_t>(workspace.memory());
    call.workspace = reinterpret_cast<void*>((start + kWorkspaceAlignment - 1) /
                                             kWorkspaceAlignment * kWorkspaceAlignment);
    check(mla_cuda_latent_attention(&call, stream));
}

}  // namespace mla::ort
