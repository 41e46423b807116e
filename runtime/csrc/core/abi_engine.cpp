// The C ABI's functions on engines.
#include <cstdio>

#include "core/abi.h"

using namespace mla::core;
using namespace mla::core::abi;

namespace {

EngineOptions read_options(const mla_engine_options* given) {
    const mla_engine_options read =
        read_struct(given, "the engine options", offsetof(mla_engine_options, device));
    EngineOptions options;
    options.bundle = &need(read.bundle, "bundle");
    options.graph.onnxruntime_library = &need(read.onnxruntime_library, "onnxruntime_library");
    options.graph.ops_library = text_or_empty(read.ops_library);
    options.graph.threads = read.threads;
    options.graph.spin = read.spin != 0;
    if (read.device != nullptr) options.device = device_of(read.device);
    options.cuda_library = text_or_empty(read.cuda_library);
    options.max_tokens = read.max_tokens;
    options.prefill_chunk = read.prefill_chunk;
    options.verify = read.verify != 0;
    return options;
}

mla_engine_info describe(Engine& engine) {
    const ModelInfo& model = engine.model();
    mla_engine_info info = MLA_ENGINE_INFO_INIT;
    info.capacity_tokens = engine.capacity_tokens();
    info.free_tokens = engine.free_tokens();
    info.bytes_per_token = engine.bytes_per_token();
    info.parameters = model.parameters;
    info.vocab_size = model.vocab_size;
    info.hidden_size = model.hidden_size;
    info.num_hidden_layers = model.num_hidden_layers;
    info.num_attention_heads = model.num_attention_heads;
    info.q_lora_rank = model.q_lora_rank;
    info.kv_lora_rank = model.kv_lora_rank;
    info.qk_nope_head_dim = model.qk_nope_head_dim;
    info.qk_rope_head_dim = model.qk_rope_head_dim;
    info.v_head_dim = model.v_head_dim;
    info.max_position_embeddings = model.max_position_embeddings;
    info.bos_token_id = model.bos_token_id.value_or(-1);
    info.prefill_chunk = engine.prefill_chunk();
    std::snprintf(info.model_type, sizeof(info.model_type), "%s", model.model_type.c_str());
    std::snprintf(info.onnxruntime, sizeof(info.onnxruntime), "%s",
                  engine.onnxruntime_version().c_str());
    return info;
}

}  // namespace

mla_status mla_engine_open(const mla_engine_options* options, mla_engine** engine) {
    return guarded([&] {
        mla_engine*& out = need(engine, "engine");
        out = engines().add(std::make_shared<Engine>(read_options(options)));
    });
}

mla_status mla_engine_close(mla_engine* engine) {
    return guarded([&] { engines().remove(engine); });
}

mla_status mla_engine_get_info(mla_engine* engine, mla_engine_info* info) {
    return guarded([&] {
        const auto found = engines().find(engine);
        read_struct(info, "the engine info");
        write_struct(info, describe(*found));
    });
}

mla_status mla_engine_eos_tokens(mla_engine* engine, mla_token* tokens, size_t capacity,
                                 size_t* count) {
    return guarded([&] {
        const auto found = engines().find(engine);
        size_t& found_count = need(count, "count");
        const auto& ids = found->model().eos_token_ids;
        write_array(ids, tokens, capacity);
        found_count = ids.size();
    });
}
