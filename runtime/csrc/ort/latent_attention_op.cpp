#include "ort/latent_attention_op.h"

#include <climits>
#include <cstddef>

#include "ort/host.h"
#include "ort/latent_attention_kernel.h"
#ifdef MLA_ORT_CUDA
#include "ort/latent_attention_cuda_kernel.h"
#endif

namespace mla::ort {

namespace {

// Inputs and outputs before the parts of the cache, and the one variadic place that takes these.
constexpr size_t kInputs = kCache + 1;
constexpr size_t kOutputs = 2;
// The smallest record, one in floating point.
constexpr int kFewestParts = 2;

// Output 1 + i may be the memory of input kCache + i. A pair beyond a node's parts is ignored.
size_t may_inplace(int** inputs, int** outputs) {
    static int from[] = {kCache, kCache + 1, kCache + 2, kCache + 3, kCache + 4};
    static int to[] = {1, 2, 3, 4, 5};
    static_assert(sizeof(from) / sizeof(*from) == cpu::kMaxParts, "one pair a part");
    *inputs = from;
    *outputs = to;
    return cpu::kMaxParts;
}

// The model's function gives way to a registered operator even where the types do not fit, so what
// a record may hold must not be narrowed here: the kernel's constructor looks at each type.
ONNXTensorElementDataType input_type(size_t index) {
    if (index < kWUk) return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    if (index < kBlockTable || index >= kCache) return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
}

template <class Kernel>
OrtStatus* create(const OrtApi& api, const OrtKernelInfo* info, void** kernel) {
    return guarded(api, [&] { *kernel = new Kernel(api, info); });
}

template <class Kernel>
OrtStatus* compute(const Kernel& kernel, OrtKernelContext* context) {
    return guarded(kernel.api, [&] { kernel.compute(context); });
}

struct LatentAttentionOp : OrtCustomOp {
    LatentAttentionOp() : OrtCustomOp{} {
        version = kApiVersion;
        GetName = [](const OrtCustomOp*) { return "LatentAttention"; };
        GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
        GetStartVersion = [](const OrtCustomOp*) { return 1; };
        GetEndVersion = [](const OrtCustomOp*) { return INT_MAX; };

        GetInputTypeCount = [](const OrtCustomOp*) { return kInputs; };
        GetInputType = [](const OrtCustomOp*, size_t index) { return input_type(index); };
        GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
        GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
            return index < kCache ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
        };
        GetVariadicInputMinArity = [](const OrtCustomOp*) { return kFewestParts; };
        GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 0; };

        GetOutputTypeCount = [](const OrtCustomOp*) { return kOutputs; };
        GetOutputType = [](const OrtCustomOp*, size_t index) {
            return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                              : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        };
        GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) {
            return index == 0 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_VARIADIC;
        };
        GetVariadicOutputMinArity = [](const OrtCustomOp*) { return kFewestParts; };
        GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 0; };

        GetMayInplace = may_inplace;
        ReleaseMayInplace = [](int*, int*) {};  // nothing was allocated

        CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info,
                            void** kernel) {
            return create<LatentAttentionKernel>(*api, info, kernel);
        };
        KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
            return compute(*static_cast<const LatentAttentionKernel*>(kernel), context);
        };
        KernelDestroy = [](void* kernel) { delete static_cast<LatentAttentionKernel*>(kernel); };
    }
};

#ifdef MLA_ORT_CUDA

// The same node for CUDAExecutionProvider, in float16. One schema serves both, so that all but
// types, the provider and the kernel must be equal.
struct LatentAttentionCudaOp : LatentAttentionOp {
    LatentAttentionCudaOp() {
        GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
        GetInputType = [](const OrtCustomOp*, size_t index) {
            return index == kQ || index == kKv ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                               : input_type(index);
        };
        GetOutputType = [](const OrtCustomOp*, size_t index) {
            return index == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                              : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        };
        CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info,
                            void** kernel) {
            return create<LatentAttentionCudaKernel>(*api, info, kernel);
        };
        KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
            return compute(*static_cast<const LatentAttentionCudaKernel*>(kernel), context);
        };
        KernelDestroy = [](void* kernel) {
            delete static_cast<LatentAttentionCudaKernel*>(kernel);
        };
    }
};

#endif

}  // namespace

const OrtCustomOp* latent_attention_op() {
    static const LatentAttentionOp op;
    return &op;
}

const OrtCustomOp* latent_attention_cuda_op() {
#ifdef MLA_ORT_CUDA
    static const LatentAttentionCudaOp op;
    return &op;
#else
    return nullptr;
#endif
}

}  // namespace mla::ort
