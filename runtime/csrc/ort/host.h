// ONNX Runtime as the operators see it: statuses, tensors, attributes.
//
// Nothing of ONNX Runtime is linked. Its functions come in the OrtApi table that the host gives to
// RegisterCustomOps, and no table is kept in a global: two hosts in one process would have two.
#pragma once

#include <onnxruntime_c_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>

namespace mla::ort {

// The oldest table with all that is used here: in-place operands came with 1.18. Asking for this
// one, whatever the headers are, lets one library serve every later onnxruntime.
constexpr uint32_t kApiVersion = 18;

// Ends an operator's callback; only `guarded` catches it. The text says what was found, what is
// allowed and what to do; ONNX Runtime puts the node's name in front.
class Error : public std::runtime_error {
  public:
    Error(OrtErrorCode code, const std::string& text) : std::runtime_error(text), code(code) {}
    OrtErrorCode code;
};

// What a caller passed is not what the operator takes.
inline Error invalid(const std::string& text) { return Error(ORT_INVALID_ARGUMENT, text); }

// Runs `body` for a callback: no exception may reach the host, which is C.
template <class Body>
OrtStatus* guarded(const OrtApi& api, const Body& body) noexcept {
    try {
        body();
        return nullptr;
    } catch (const Error& error) {
        return api.CreateStatus(error.code, error.what());
    } catch (const std::exception& error) {
        return api.CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
    } catch (...) {
        return api.CreateStatus(ORT_RUNTIME_EXCEPTION, "LatentAttention: unknown exception");
    }
}

// Throws what a function of ONNX Runtime reports.
void check(const OrtApi& api, OrtStatus* status);

// A tensor's memory, type and shape. A view: it owns nothing.
struct Tensor {
    static constexpr size_t kMaxRank = 5;  // an arena of the blocked layout

    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    size_t rank = 0;
    std::array<int64_t, kMaxRank> shape{};
    void* data = nullptr;

    template <class T>
    T* as() const {
        return static_cast<T*>(data);
    }
    int64_t elements() const;
};

Tensor view(const OrtApi& api, const OrtValue& value);
Tensor input(const OrtApi& api, const OrtKernelContext* context, size_t index);

// Output `index` with the shape of `like`. Its memory is that of an input where the caller bound
// one value as both.
Tensor output(const OrtApi& api, OrtKernelContext* context, size_t index, const Tensor& like);

// "[2, 1, 512]"
std::string text(const Tensor& tensor);

// An initializer that no caller can replace, or nullptr if input `index` is computed or fed.
const OrtValue* constant_input(const OrtApi& api, const OrtKernelInfo* info, size_t index);

int64_t integer_attribute(const OrtApi& api, const OrtKernelInfo* info, const char* name);
float float_attribute(const OrtApi& api, const OrtKernelInfo* info, const char* name);
std::string string_attribute(const OrtApi& api, const OrtKernelInfo* info, const char* name);

}  // namespace mla::ort
