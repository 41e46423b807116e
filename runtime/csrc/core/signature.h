// What a decoder graph takes and gives, held against the manifest.
#pragma once

#include "core/bundle.h"
#include "core/host.h"

namespace mla::core {

std::string cache_input(size_t layer, const CachePart& part);   // "cache.0.codes"
std::string cache_output(size_t layer, const CachePart& part);  // "present.0.codes"

ONNXTensorElementDataType onnx_type(ElementType type);

// Whether inputs and outputs are those of mla_deploy/bundle.py and of the manifest.
// Errors: MLA_BAD_BUNDLE.
void check_signature(const OrtApi& api, const OrtSession& session, const Bundle& bundle);

}  // namespace mla::core
