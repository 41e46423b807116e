#include "core/host.h"

#include <dlfcn.h>

#include <map>
#include <mutex>

namespace mla::core {

namespace {

Error unusable(const std::string& library, const std::string& found) {
    return Error(MLA_BAD_RUNTIME, library + " cannot be used as onnxruntime")
        .found(found)
        .next("name the shared library of onnxruntime 1.", kOrtApiVersion,
              " or later, such as onnxruntime/capi/libonnxruntime.so.1.32.0 of the Python package");
}

OrtHost open_library(const std::string& library) {
    // Local: a process may hold another onnxruntime, such as that of the Python module.
    void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) throw unusable(library, dlerror());
    using GetApiBase = const OrtApiBase*(ORT_API_CALL*)();
    const auto get_base = reinterpret_cast<GetApiBase>(dlsym(handle, "OrtGetApiBase"));
    if (get_base == nullptr) {
        dlclose(handle);
        throw unusable(library, "it has no OrtGetApiBase");
    }
    OrtHost host;
    host.version = get_base()->GetVersionString();
    host.api = get_base()->GetApi(kOrtApiVersion);
    if (host.api == nullptr) throw unusable(library, "its version " + host.version);
    check(*host.api, host.api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "mla_deploy", &host.env),
          MLA_BAD_RUNTIME, library + " cannot be started");
    return host;
}

}  // namespace

const OrtHost& OrtHost::open(const std::string& library) {
    // Never destroyed: at the end of the process other threads may still be in it.
    static auto& mutex = *new std::mutex;
    static auto& hosts = *new std::map<std::string, OrtHost>;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = hosts.find(library);
    if (found != hosts.end()) return found->second;
    return hosts.emplace(library, open_library(library)).first->second;
}

std::string first_line(const std::string& message) { return message.substr(0, message.find('\n')); }

void check(const OrtApi& api, OrtStatus* status, mla_status as, const std::string& what) {
    if (status == nullptr) return;
    const OrtOwned<OrtStatus> owned(status, api.ReleaseStatus);
    throw Error(as, what).found(first_line(api.GetErrorMessage(status)));
}

}  // namespace mla::core
