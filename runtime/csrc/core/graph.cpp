#include "core/graph.h"

#include "core/arena.h"
#include "core/cuda_provider.h"
#include "core/signature.h"

namespace mla::core {

namespace {

OrtOwned<OrtMemoryInfo> memory_of(const OrtApi& api, Device device) {
    OrtMemoryInfo* memory = nullptr;
    const char* const name = device == Device::kCpu ? "Cpu" : "Cuda";
    check(api, api.CreateMemoryInfo(name, OrtDeviceAllocator, 0, OrtMemTypeDefault, &memory),
          MLA_BAD_RUNTIME, "onnxruntime cannot describe memory");
    return {memory, api.ReleaseMemoryInfo};
}

OrtOwned<OrtSessionOptions> session_options(const OrtHost& host, Device device,
                                            const DecoderGraph::Options& options) {
    const OrtApi& api = *host.api;
    const auto must = [&](OrtStatus* status) {
        check(api, status, MLA_BAD_RUNTIME, "onnxruntime does not take the options");
    };
    OrtSessionOptions* raw = nullptr;
    must(api.CreateSessionOptions(&raw));
    OrtOwned<OrtSessionOptions> owned(raw, api.ReleaseSessionOptions);
    must(api.SetSessionLogSeverityLevel(raw, ORT_LOGGING_LEVEL_ERROR));
    must(api.SetInterOpNumThreads(raw, 1));
    must(api.SetIntraOpNumThreads(raw, static_cast<int>(options.threads)));
    must(api.AddSessionConfigEntry(raw, "session.intra_op.allow_spinning",
                                   options.spin ? "1" : "0"));
    if (device == Device::kCuda) append_cuda_provider(host, *raw);
    if (!options.ops_library.empty()) {
        check(api, api.RegisterCustomOpsLibrary_V2(raw, options.ops_library.c_str()),
              MLA_BAD_RUNTIME, options.ops_library + " cannot be used as operator library");
    }
    return owned;
}

}  // namespace

DecoderGraph::DecoderGraph(const Bundle& bundle, const Options& options)
    : host_(OrtHost::open(options.onnxruntime_library)),
      api_(*host_.api),
      host_memory_(memory_of(api_, Device::kCpu)),
      cache_memory_(memory_of(api_, bundle.manifest.device)),
      session_(open_session(bundle, options)),
      binding_(nullptr, api_.ReleaseIoBinding),
      vocab_size_(bundle.manifest.model.vocab_size) {
    check_signature(api_, *session_, bundle);
    OrtIoBinding* binding = nullptr;
    check(api_.CreateIoBinding(session_.get(), &binding));
    binding_.reset(binding);
}

OrtOwned<OrtSession> DecoderGraph::open_session(const Bundle& bundle,
                                                const Options& options) const {
    const auto prepared = session_options(host_, bundle.manifest.device, options);
    const std::string path = bundle.graph_path();
    OrtSession* session = nullptr;
    OrtStatus* status = api_.CreateSession(host_.env, path.c_str(), prepared.get(), &session);
    core::check(api_, status, MLA_BAD_BUNDLE,
                join("onnxruntime ", host_.version, " cannot load ", path));
    return {session, api_.ReleaseSession};
}

void DecoderGraph::bind_cache(PageArena& arena) {
    for (const PageArena::Array& array : arena.arrays()) {
        std::vector<int64_t> shape{arena.pages()};
        shape.insert(shape.end(), array.part.page_shape.begin(), array.part.page_shape.end());
        const auto value =
            tensor(*cache_memory_, array.data, array.bytes, shape, onnx_type(array.part.type));
        const std::string input = cache_input(array.layer, array.part);
        const std::string output = cache_output(array.layer, array.part);
        check(api_.BindInput(binding_.get(), input.c_str(), value.get()));
        check(api_.BindOutput(binding_.get(), output.c_str(), value.get()));
    }
}

const float* DecoderGraph::run(StepInputs& in, Cancellation* cancellation) {
    bind_input("input_ids", in.input_ids, {in.batch, in.steps});
    bind_input("past_lengths", in.past_lengths, {in.batch});
    bind_input("new_lengths", in.new_lengths, {in.batch});
    bind_input("block_table", in.block_table, {in.batch, in.pages});
    bind_input("logit_index", in.logit_index, {in.batch, in.logits});
    logits_.resize(static_cast<size_t>(in.batch * in.logits * vocab_size_));
    const auto output =
        tensor(*host_memory_, logits_.data(), logits_.size() * sizeof(float),
               {in.batch, in.logits, vocab_size_}, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    check(api_.BindOutput(binding_.get(), "logits", output.get()));

    OrtRunOptions* options = nullptr;
    check(api_.CreateRunOptions(&options));
    const OrtOwned<OrtRunOptions> owned(options, api_.ReleaseRunOptions);
    OrtStatus* status = nullptr;
    if (cancellation == nullptr) {
        status = api_.RunWithBinding(session_.get(), options, binding_.get());
    } else {
        const Cancellation::Interruptible interruptible(*cancellation, [&] {
            OrtStatus* failure = api_.RunOptionsSetTerminate(options);
            if (failure != nullptr) api_.ReleaseStatus(failure);
        });
        cancellation->check();
        status = api_.RunWithBinding(session_.get(), options, binding_.get());
        if (status != nullptr && cancellation->requested()) {
            api_.ReleaseStatus(status);
            cancellation->check();
        }
    }
    check(status);
    return logits_.data();
}

void DecoderGraph::bind_input(const char* name, std::vector<int64_t>& values,
                              const std::vector<int64_t>& shape) {
    const auto value = tensor(*host_memory_, values.data(), values.size() * sizeof(int64_t), shape,
                              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    check(api_.BindInput(binding_.get(), name, value.get()));  // takes a share of the value
}

OrtOwned<OrtValue> DecoderGraph::tensor(const OrtMemoryInfo& memory, void* data, size_t bytes,
                                        const std::vector<int64_t>& shape,
                                        ONNXTensorElementDataType type) const {
    OrtValue* value = nullptr;
    check(api_.CreateTensorWithDataAsOrtValue(&memory, data, bytes, shape.data(), shape.size(),
                                              type, &value));
    return {value, api_.ReleaseValue};
}

void DecoderGraph::check(OrtStatus* status) const {
    core::check(api_, status, MLA_MODEL_FAILED, "onnxruntime cannot run the graph");
}

}  // namespace mla::core
