// RegisterCustomOps: the entry point of the library, called by ONNX Runtime or by its user.
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "ort/host.h"
#include "ort/latent_attention_op.h"

namespace mla::ort {
namespace {

using Domain = std::unique_ptr<OrtCustomOpDomain, decltype(OrtApi::ReleaseCustomOpDomain)>;

// The domain of a host. Options only point to it, so it lives as long as the library is loaded.
OrtCustomOpDomain* domain(const OrtApi& api) {
    static std::mutex mutex;
    static std::unordered_map<const OrtApi*, Domain> domains;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = domains.find(&api);
    if (found != domains.end()) return found->second.get();
    OrtCustomOpDomain* raw = nullptr;
    check(api, api.CreateCustomOpDomain("ai.mla_deploy", &raw));
    Domain made(raw, api.ReleaseCustomOpDomain);
    check(api, api.CustomOpDomain_Add(raw, latent_attention_op()));
    if (const OrtCustomOp* op = latent_attention_cuda_op())
        check(api, api.CustomOpDomain_Add(raw, op));
    domains.emplace(&api, std::move(made));
    return raw;
}

}  // namespace
}  // namespace mla::ort

// Makes the operators known to every session that is made with `options`. The library must stay
// loaded as long as such sessions live. Safe to call from any thread, and for any number of
// options.
extern "C" __attribute__((visibility("default"))) OrtStatus* ORT_API_CALL
RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(mla::ort::kApiVersion);
    if (api == nullptr) {
        const std::string text = "the operator library of mla-deploy needs onnxruntime 1." +
                                 std::to_string(mla::ort::kApiVersion) + " or later, and this is " +
                                 base->GetVersionString() +
                                 ": use a newer onnxruntime, or run without the library";
        return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, text.c_str());
    }
    return mla::ort::guarded(*api, [&] {
        mla::ort::check(*api, api->AddCustomOpDomain(options, mla::ort::domain(*api)));
    });
}
