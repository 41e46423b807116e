#include "ort/host.h"

#include <memory>

namespace mla::ort {

void check(const OrtApi& api, OrtStatus* status) {
    if (status == nullptr) return;
    const Error error(api.GetErrorCode(status), api.GetErrorMessage(status));
    api.ReleaseStatus(status);
    throw error;
}

int64_t Tensor::elements() const {
    int64_t count = 1;
    for (size_t axis = 0; axis < rank; ++axis) count *= shape[axis];
    return count;
}

Tensor view(const OrtApi& api, const OrtValue& value) {
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    check(api, api.GetTensorTypeAndShape(&value, &raw));
    const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api.ReleaseTensorTypeAndShapeInfo)>
        info(raw, api.ReleaseTensorTypeAndShapeInfo);
    Tensor tensor;
    check(api, api.GetTensorElementType(raw, &tensor.type));
    check(api, api.GetDimensionsCount(raw, &tensor.rank));
    if (tensor.rank > Tensor::kMaxRank) {
        throw invalid("a tensor has " + std::to_string(tensor.rank) + " axes; none has more than " +
                      std::to_string(Tensor::kMaxRank) + ": export the model again");
    }
    check(api, api.GetDimensions(raw, tensor.shape.data(), tensor.rank));
    // The table has one accessor, for reading and for writing.
    check(api, api.GetTensorMutableData(const_cast<OrtValue*>(&value), &tensor.data));
    return tensor;
}

Tensor input(const OrtApi& api, const OrtKernelContext* context, size_t index) {
    const OrtValue* value = nullptr;
    check(api, api.KernelContext_GetInput(context, index, &value));
    if (value == nullptr) {
        throw invalid("input " + std::to_string(index) + " is missing: export the model again");
    }
    return view(api, *value);
}

Tensor output(const OrtApi& api, OrtKernelContext* context, size_t index, const Tensor& like) {
    OrtValue* value = nullptr;
    check(api, api.KernelContext_GetOutput(context, index, like.shape.data(), like.rank, &value));
    if (value == nullptr) {
        throw invalid("output " + std::to_string(index) +
                      " is not wanted, but the cache must go "
                      "somewhere: export the model again");
    }
    return view(api, *value);
}

std::string text(const Tensor& tensor) {
    std::string shape = "[";
    for (size_t axis = 0; axis < tensor.rank; ++axis) {
        shape += (axis > 0 ? ", " : "") + std::to_string(tensor.shape[axis]);
    }
    return shape + "]";
}

const OrtValue* constant_input(const OrtApi& api, const OrtKernelInfo* info, size_t index) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    check(api, api.KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
    return is_constant != 0 ? value : nullptr;
}

int64_t integer_attribute(const OrtApi& api, const OrtKernelInfo* info, const char* name) {
    int64_t value = 0;
    check(api, api.KernelInfoGetAttribute_int64(info, name, &value));
    return value;
}

float float_attribute(const OrtApi& api, const OrtKernelInfo* info, const char* name) {
    float value = 0;
    check(api, api.KernelInfoGetAttribute_float(info, name, &value));
    return value;
}

std::string string_attribute(const OrtApi& api, const OrtKernelInfo* info, const char* name) {
    size_t size = 0;  // with the terminating zero
    check(api, api.KernelInfoGetAttribute_string(info, name, nullptr, &size));
    std::string value(size, '\0');
    check(api, api.KernelInfoGetAttribute_string(info, name, value.data(), &size));
    value.resize(size > 0 ? size - 1 : 0);
    return value;
}

}  // namespace mla::ort
