// ONNX Runtime as the engine sees it: a library opened at run time, its functions, its objects.
#pragma once

#include <onnxruntime_c_api.h>

#include <memory>
#include <string>

#include "core/error.h"

namespace mla::core {

// The oldest table of functions with all that is used here; every later onnxruntime has it too.
constexpr uint32_t kOrtApiVersion = 18;

// An onnxruntime library. Opened once a path and never closed: its threads outlive everything.
struct OrtHost {
    const OrtApi* api;
    OrtEnv* env;
    std::string version;

    // Errors: MLA_BAD_RUNTIME.
    static const OrtHost& open(const std::string& library);
};

// Of what ONNX Runtime reports, the rest being its own sources.
std::string first_line(const std::string& message);

// Throws what a function of ONNX Runtime reports, as an Error of that status.
void check(const OrtApi& api, OrtStatus* status, mla_status as, const std::string& what);

// An object of ONNX Runtime, released at the end of its life.
template <class Object>
using OrtOwned = std::unique_ptr<Object, void(ORT_API_CALL*)(Object*)>;

}  // namespace mla::core
