#include "core/cuda_provider.h"

namespace mla::core {

namespace {

// Products in TF32 have ten bits: routers choose other experts then.
constexpr const char* kKeys[] = {"device_id", "use_tf32", "enable_cuda_graph"};

}  // namespace

void append_cuda_provider(const OrtHost& host, OrtSessionOptions& options, bool records) {
    const OrtApi& api = *host.api;
    const auto must = [&](OrtStatus* status) {
        try {
            check(api, status, MLA_BAD_RUNTIME, "");
        } catch (const Error& error) {
            throw Error(MLA_BAD_RUNTIME,
                        "onnxruntime " + host.version + " cannot use its CUDA provider")
                .found(*error.fields().found)
                .next(
                    "have onnxruntime-gpu instead of onnxruntime, with the libraries of CUDA and "
                    "cuDNN that it wants: pip uninstall onnxruntime; pip install "
                    "'onnxruntime-gpu[cuda,cudnn]'");
        }
    };
    OrtCUDAProviderOptionsV2* raw = nullptr;
    must(api.CreateCUDAProviderOptions(&raw));
    const OrtOwned<OrtCUDAProviderOptionsV2> owned(raw, api.ReleaseCUDAProviderOptions);
    const char* const values[] = {"0", "0", records ? "1" : "0"};
    static_assert(std::size(kKeys) == std::size(values));
    must(api.UpdateCUDAProviderOptions(raw, kKeys, values, std::size(kKeys)));
    must(api.SessionOptionsAppendExecutionProvider_CUDA_V2(&options, raw));
}

}  // namespace mla::core
