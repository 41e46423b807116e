#include "core/graph.h"

#include "core/arena.h"
#include "core/cuda_provider.h"
#include "core/signature.h"

namespace mla::core {

namespace {

// Each holds memory of the device for as long as the engine lives.
constexpr size_t kMostRecordings = 64;
constexpr const char* kNotRecorded = "-1";

size_t elements(const std::vector<int64_t>& shape) {
    size_t count = 1;
    for (const int64_t extent : shape) count *= static_cast<size_t>(extent);
    return count;
}

OrtOwned<OrtMemoryInfo> memory_of(const OrtApi& api, Device device) {
    OrtMemoryInfo* memory = nullptr;
    const char* const name = device == Device::kCpu ? "Cpu" : "Cuda";
    check(api, api.CreateMemoryInfo(name, OrtDeviceAllocator, 0, OrtMemTypeDefault, &memory),
          MLA_BAD_RUNTIME, "onnxruntime cannot describe memory");
    return {memory, api.ReleaseMemoryInfo};
}

// What onnxruntime's own kernels do on the device involves the host, which cannot be recorded.
bool records(Device device, const DecoderGraph::Options& options) {
    return device == Device::kCuda && !options.ops_library.empty();
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
    if (device == Device::kCuda) append_cuda_provider(host, *raw, records(device, options));
    if (!options.ops_library.empty()) {
        check(api, api.RegisterCustomOpsLibrary_V2(raw, options.ops_library.c_str()),
              MLA_BAD_KERNELS, options.ops_library + " cannot be used as operator library");
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
      binding_(new_binding()),
      vocab_size_(bundle.manifest.model.vocab_size),
      records_(records(bundle.manifest.device, options)) {
    check_signature(api_, *session_, bundle);
}

OrtOwned<OrtSession> DecoderGraph::open_session(const Bundle& bundle,
                                                const Options& options) const {
    const auto prepared = session_options(host_, bundle.manifest.device, options);
    const std::string path = bundle.graph_path();
    OrtSession* session = nullptr;
    const OrtOwned<OrtStatus> status(
        api_.CreateSession(host_.env, path.c_str(), prepared.get(), &session), api_.ReleaseStatus);
    if (!status) return {session, api_.ReleaseSession};
    throw Error(MLA_BAD_GRAPH, join("onnxruntime ", host_.version, " cannot load ", path))
        .found(first_line(api_.GetErrorMessage(status.get())))
        .next("its operators are those of ", bundle.manifest.lowering,
              ": take an onnxruntime of that version or a later one");
}

OrtOwned<OrtIoBinding> DecoderGraph::new_binding() const {
    OrtIoBinding* binding = nullptr;
    check(api_.CreateIoBinding(session_.get(), &binding));
    return {binding, api_.ReleaseIoBinding};
}

void DecoderGraph::bind_cache(PageArena& arena) {
    arena_ = &arena;
    bind_arena(*binding_);
}

void DecoderGraph::bind_arena(OrtIoBinding& binding) const {
    for (const PageArena::Array& array : arena_->arrays()) {
        std::vector<int64_t> shape{arena_->pages()};
        shape.insert(shape.end(), array.part.page_shape.begin(), array.part.page_shape.end());
        const auto value =
            tensor(*cache_memory_, array.data, array.bytes, shape, onnx_type(array.part.type));
        const std::string input = cache_input(array.layer, array.part);
        const std::string output = cache_output(array.layer, array.part);
        check(api_.BindInput(&binding, input.c_str(), value.get()));
        check(api_.BindOutput(&binding, output.c_str(), value.get()));
    }
}

bool DecoderGraph::is_recorded(int64_t steps, int64_t logits) const {
    return records_ && steps == 1 && logits == 1;
}

int64_t DecoderGraph::pages_for(int64_t steps, int64_t logits, int64_t pages) const {
    if (!is_recorded(steps, logits)) return pages;
    int64_t power = 1;
    while (power < pages) power *= 2;
    return power;
}

const float* DecoderGraph::run(StepInputs& in, Cancellation* cancellation) {
    logits_.resize(static_cast<size_t>(in.batch * in.logits * vocab_size_));
    if (const Recording* const recording = recording_for(in)) {
        std::vector<int64_t> packed;
        in.for_each([&](const char*, std::vector<int64_t>& values, const auto&) {
            packed.insert(packed.end(), values.begin(), values.end());
        });
        recording->memory.write(recording->data, packed.data(), recording->input_bytes);
        // Nothing may interrupt what records; one token does not take long.
        if (cancellation != nullptr) cancellation->check();
        run(*recording->binding, recording->id, nullptr);
        recording->memory.read(logits_.data(), recording->data + recording->input_bytes,
                               logits_.size() * sizeof(float));
        return logits_.data();
    }
    in.for_each([&](const char* name, std::vector<int64_t>& values, const auto& shape) {
        bind_input(*binding_, *host_memory_, name, values.data(), shape);
    });
    bind_logits(*binding_, *host_memory_, logits_.data(), in);
    run(*binding_, kNotRecorded, cancellation);
    return logits_.data();
}

const DecoderGraph::Recording* DecoderGraph::recording_for(StepInputs& in) {
    if (!is_recorded(in.steps, in.logits)) return nullptr;
    const auto found = recordings_.find({in.batch, in.pages});
    if (found != recordings_.end()) return found->second.get();
    if (recordings_.size() == kMostRecordings) return nullptr;
    auto made = record(in);
    return recordings_.emplace(std::pair(in.batch, in.pages), std::move(made)).first->second.get();
}

std::unique_ptr<DecoderGraph::Recording> DecoderGraph::record(StepInputs& in) const {
    size_t input_bytes = 0;
    in.for_each([&](const char*, std::vector<int64_t>& values, const auto&) {
        input_bytes += values.size() * sizeof(int64_t);
    });
    const size_t bytes = input_bytes + logits_.size() * sizeof(float);
    CacheMemory& memory = arena_->memory();
    uint8_t* const data = memory.allocate(bytes);
    if (data == nullptr) {
        throw Error(MLA_OUT_OF_MEMORY, "the device has no memory left for a step's logits")
            .found(bytes, " bytes wanted")
            .next("open the bundle with a smaller max_tokens, or step fewer sessions at once");
    }
    std::unique_ptr<Recording> made(new Recording{memory,
                                                  data,
                                                  input_bytes,
                                                  bytes,
                                                  std::to_string(recordings_.size()),
                                                  {nullptr, api_.ReleaseIoBinding}});
    made->binding = new_binding();
    bind_arena(*made->binding);
    uint8_t* at = data;
    in.for_each([&](const char* name, std::vector<int64_t>& values, const auto& shape) {
        bind_input(*made->binding, *cache_memory_, name, at, shape);
        at += values.size() * sizeof(int64_t);
    });
    bind_logits(*made->binding, *cache_memory_, at, in);
    return made;
}

void DecoderGraph::run(const OrtIoBinding& binding, const std::string& recording,
                       Cancellation* cancellation) const {
    OrtRunOptions* options = nullptr;
    check(api_.CreateRunOptions(&options));
    const OrtOwned<OrtRunOptions> owned(options, api_.ReleaseRunOptions);
    if (records_) {
        check(api_.AddRunConfigEntry(options, "gpu_graph_id", recording.c_str()));
    }
    OrtStatus* status = nullptr;
    if (cancellation == nullptr) {
        status = api_.RunWithBinding(session_.get(), options, &binding);
    } else {
        const Cancellation::Interruptible interruptible(*cancellation, [&] {
            OrtStatus* failure = api_.RunOptionsSetTerminate(options);
            if (failure != nullptr) api_.ReleaseStatus(failure);
        });
        cancellation->check();
        status = api_.RunWithBinding(session_.get(), options, &binding);
        if (status != nullptr && cancellation->requested()) {
            api_.ReleaseStatus(status);
            cancellation->check();
        }
    }
    check(status);
}

void DecoderGraph::bind_input(OrtIoBinding& binding, const OrtMemoryInfo& memory, const char* name,
                              void* data, const std::vector<int64_t>& shape) const {
    const auto value = tensor(memory, data, elements(shape) * sizeof(int64_t), shape,
                              ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    check(api_.BindInput(&binding, name, value.get()));  // takes a share of the value
}

void DecoderGraph::bind_logits(OrtIoBinding& binding, const OrtMemoryInfo& memory, void* data,
                               const StepInputs& in) const {
    const std::vector<int64_t> shape{in.batch, in.logits, vocab_size_};
    const auto value = tensor(memory, data, elements(shape) * sizeof(float), shape,
                              ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);
    check(api_.BindOutput(&binding, "logits", value.get()));
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
