// LatentAttention as a TensorRT plugin: mla_cuda_latent_attention on TensorRT's tensors and stream.
//
// Inputs and outputs are those of the ONNX node (ort/latent_attention_inputs.h), with three
// differences: q, kv and the output are float32, float16 or bfloat16; weights are float16; and the
// packed codes are declared int8, as plugins take no uint8. The bytes are the same.
//
// The cache is written in place: output 1 + i is the memory of input kCache + i.
#pragma once

#include <NvInferRuntime.h>

#include <string>
#include <vector>

#include "tensorrt/attributes.h"

namespace mla::tensorrt {

constexpr const char* kName = "LatentAttention";
constexpr const char* kVersion = "1";

// The plugin's inputs, in order; the parts of the cache follow, and are its outputs after `output`.
enum Input : int32_t {
    kQ,            // [B, S, H * (N + R)]
    kKv,           // [B, S, kv_lora_rank + R] as q
    kCos,          // [B, S, R / 2] float32
    kSin,          // [B, S, R / 2] float32
    kWUk,          // [H, N, kv_lora_rank] float16
    kWUv,          // [H, kv_lora_rank, V] float16
    kBlockTable,   // [B, M] int64
    kPastLengths,  // [B] int64
    kNewLengths,   // [B] int64
    kCache,        // [pages, *page_shape], one a part
};

class LatentAttentionPlugin final : public nvinfer1::IPluginV3,
                                    public nvinfer1::IPluginV3OneCore,
                                    public nvinfer1::IPluginV3OneBuildV2,
                                    public nvinfer1::IPluginV3OneRuntime {
  public:
    // Throws std::invalid_argument where the kernels cannot compute such a node.
    LatentAttentionPlugin(const Attributes& attributes, const char* name_space);

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    const char* getPluginName() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return namespace_; }

    // IPluginV3OneBuildV2
    int32_t getNbOutputs() const noexcept override { return 1 + parts_; }
    int32_t configurePlugin(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                            const nvinfer1::DynamicPluginTensorDesc* out,
                            int32_t outputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* out, int32_t outputs,
                               const nvinfer1::DataType* in,
                               int32_t inputs) const noexcept override;
    int32_t getOutputShapes(const nvinfer1::DimsExprs* in, int32_t inputs,
                            const nvinfer1::DimsExprs* shape_in, int32_t shape_inputs,
                            nvinfer1::DimsExprs* out, int32_t outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t position, const nvinfer1::DynamicPluginTensorDesc* all,
                                   int32_t inputs, int32_t outputs) noexcept override;
    size_t getWorkspaceSize(const nvinfer1::DynamicPluginTensorDesc* in, int32_t inputs,
                            const nvinfer1::DynamicPluginTensorDesc* out,
                            int32_t outputs) const noexcept override;
    int32_t getAliasedInput(int32_t output) noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(const nvinfer1::PluginTensorDesc* in, int32_t inputs,
                          const nvinfer1::PluginTensorDesc* out, int32_t outputs) noexcept override;
    int32_t enqueue(const nvinfer1::PluginTensorDesc* in_desc,
                    const nvinfer1::PluginTensorDesc* out_desc, const void* const* in,
                    void* const* out, void* workspace, cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(
        nvinfer1::IPluginResourceContext* context) noexcept override;
    const nvinfer1::PluginFieldCollection* getFieldsToSerialize() noexcept override;

  private:
    // Throws std::invalid_argument where sizes that are known (not -1) do not fit the attributes or
    // each other.
    void check(const nvinfer1::Dims* const* in, int32_t inputs, int32_t outputs) const;
    // The call of tensors with these sizes.
    mla_cuda_attention call(const nvinfer1::Dims& q, const nvinfer1::Dims& table,
                            const nvinfer1::Dims& cache) const;

    Attributes attributes_;
    const char* namespace_;  // of the creator, which lives as long as the library
    int32_t parts_ = 0;
    mla_cuda_part records_[5] = {};
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_ = {};
};

}  // namespace mla::tensorrt
