// What goes wrong is said through TensorRT's logger: its calls return a number only.
#pragma once

#include <NvInferRuntime.h>

#include <string>

namespace mla::tensorrt {

// Where to find the logger; null: errors go to standard error.
void use_logger(nvinfer1::ILoggerFinder* finder);

void log_error(const std::string& text);

}  // namespace mla::tensorrt
