// getCreators and setLoggerFinder: what TensorRT calls when it loads the library.
#include <cstdio>
#include <memory>

#include "tensorrt/log.h"
#include "tensorrt/plugin.h"

namespace mla::tensorrt {

namespace {

nvinfer1::ILoggerFinder* logger_finder = nullptr;

class Creator final : public nvinfer1::IPluginCreatorV3One {
  public:
    explicit Creator(const char* name_space) : namespace_(name_space) {
        collection_ = {static_cast<int32_t>(field_names().size()), field_names().data()};
    }

    const char* getPluginName() const noexcept override { return kName; }
    const char* getPluginVersion() const noexcept override { return kVersion; }
    const char* getPluginNamespace() const noexcept override { return namespace_; }
    const nvinfer1::PluginFieldCollection* getFieldNames() noexcept override {
        return &collection_;
    }

    nvinfer1::IPluginV3* createPlugin(const char*, const nvinfer1::PluginFieldCollection* fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        try {
            return new LatentAttentionPlugin(from_fields(*fields), namespace_);
        } catch (const std::exception& error) {
            log_error(error.what());
            return nullptr;
        }
    }

  private:
    const char* namespace_;
    nvinfer1::PluginFieldCollection collection_;
};

}  // namespace

void use_logger(nvinfer1::ILoggerFinder* finder) { logger_finder = finder; }

void log_error(const std::string& text) {
    nvinfer1::ILogger* logger = logger_finder ? logger_finder->findLogger() : nullptr;
    if (logger) {
        logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    } else {
        std::fprintf(stderr, "%s\n", text.c_str());
    }
}

}  // namespace mla::tensorrt

extern "C" {

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    mla::tensorrt::use_logger(finder);
}

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) {
    // The namespace is the node's domain; parsers before 10.15 look in the empty one alone.
    static mla::tensorrt::Creator in_domain("ai.mla_deploy"), without("");
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&in_domain, &without};
    count = 2;
    return creators;
}

}  // extern "C"
