// The C ABI's functions on sessions.
#include "core/abi.h"
#include "core/session_file.h"

using namespace mla::core;
using namespace mla::core::abi;

namespace {

// A request as the engine takes it. Its session lives as long as `owners`.
Request read_request(const mla_request& given, std::vector<std::shared_ptr<Session>>& owners) {
    const mla_request read = read_struct(&given, "a request");
    owners.push_back(sessions().find(read.session));
    const Session& session = *owners.back();
    need_array(read.tokens, read.token_count, "tokens");
    Request request{owners.back().get(), read.tokens, read.token_count, {}, read.logits};
    if (read.positions != nullptr) {
        request.positions.assign(read.positions, read.positions + read.position_count);
    } else if (read.position_count > 0) {
        throw invalid("positions is null").found(read.position_count, " of them are to be there");
    } else if (read.logits != nullptr && read.token_count > 0) {
        request.positions = {read.token_count - 1};
    }
    const size_t vocab_size = session.engine().model().vocab_size;
    if (request.positions.size() > (read.logits ? read.logits_capacity : 0) / vocab_size) {
        throw invalid("the place for the logits is too small")
            .found(read.logits ? read.logits_capacity : 0, " floats")
            .allowed(request.positions.size(), " times ", vocab_size, " floats");
    }
    return request;
}

std::vector<Request> read_requests(const mla_request* requests, size_t count,
                                   std::vector<std::shared_ptr<Session>>& owners) {
    need_array(requests, count, "requests");
    std::vector<Request> read;
    // A program of newer headers has larger elements.
    const auto* bytes = reinterpret_cast<const unsigned char*>(requests);
    for (size_t i = 0; i < count; ++i) {
        const auto& request = *reinterpret_cast<const mla_request*>(bytes);
        read.push_back(read_request(request, owners));
        if (request.struct_size != requests->struct_size) {
            throw invalid("the requests differ in struct_size")
                .found(request.struct_size)
                .allowed(requests->struct_size, ", as the first has");
        }
        bytes += request.struct_size;
    }
    return read;
}

}  // namespace

mla_status mla_session_create(mla_engine* engine, mla_session** session) {
    return guarded([&] {
        mla_session*& out = need(session, "session");
        out = sessions().add(engines().find(engine)->session());
    });
}

mla_status mla_session_destroy(mla_session* session) {
    return guarded([&] { sessions().remove(session); });
}

mla_status mla_session_fork(mla_session* session, mla_session** fork) {
    return guarded([&] {
        mla_session*& out = need(fork, "fork");
        const auto found = sessions().find(session);
        out = sessions().add(found->engine().fork(*found));
    });
}

mla_status mla_session_rewind(mla_session* session, size_t length) {
    return guarded([&] {
        const auto found = sessions().find(session);
        found->engine().rewind(*found, length);
    });
}

mla_status mla_session_get_info(mla_session* session, mla_session_info* info) {
    return guarded([&] {
        const auto found = sessions().find(session);
        mla_session_info filled = read_struct(info, "the session info");
        const Engine::SessionInfo state = found->engine().info(*found);
        filled.length = state.length;
        filled.room = state.room;
        filled.cache_bytes = state.cache_bytes;
        write_struct(info, filled);
    });
}

mla_status mla_session_tokens(mla_session* session, mla_token* tokens, size_t capacity,
                              size_t* count) {
    return guarded([&] {
        const auto found = sessions().find(session);
        size_t& found_count = need(count, "count");
        const std::vector<mla_token> held = found->engine().tokens(*found);
        write_array(held, tokens, capacity);
        found_count = held.size();
    });
}

mla_status mla_session_prefill(mla_session* session, const mla_token* tokens, size_t count,
                               float* logits, size_t logits_capacity) {
    return guarded([&] {
        mla_request request = MLA_REQUEST_INIT;
        request.session = session;
        request.tokens = tokens;
        request.token_count = count;
        request.logits = logits;
        request.logits_capacity = logits_capacity;
        std::vector<std::shared_ptr<Session>> owners;
        const Request read = read_request(request, owners);
        owners[0]->engine().step({read}, nullptr);
    });
}

mla_status mla_session_decode(mla_session* session, mla_token token, float* logits,
                              size_t logits_capacity) {
    return mla_session_prefill(session, &token, 1, logits, logits_capacity);
}

mla_status mla_step(mla_engine* engine, const mla_request* requests, size_t count,
                    mla_cancellation* cancellation) {
    return guarded([&] {
        const auto found = engines().find(engine);
        const auto cancel = optional_cancellation(cancellation);
        std::vector<std::shared_ptr<Session>> owners;
        const std::vector<Request> read = read_requests(requests, count, owners);
        found->step(read, cancel.get());
    });
}

mla_status mla_session_save(mla_session* session, const char* path) {
    return guarded([&] { save_session(*sessions().find(session), &need(path, "path")); });
}

mla_status mla_session_load(mla_engine* engine, const char* path, mla_session** session) {
    return guarded([&] {
        mla_session*& out = need(session, "session");
        out = sessions().add(load_session(*engines().find(engine), &need(path, "path")));
    });
}
