#include "python/engine_binding.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>

#include "core/session_file.h"
#include "python/bindings.h"
#include "python/errors.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mla::core;

namespace {

using NoGil = nb::call_guard<nb::gil_scoped_release>;
using LogitArray =
    nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // [positions, vocab_size]

// A path as os.fsencode gives it.
std::string path_of(const nb::bytes& path) {
    const std::string text(path.c_str(), path.size());
    if (text.find('\0') != std::string::npos) {
        throw invalid("a path holds a zero byte").next("name a file of this system");
    }
    return text;
}

void open_engine(PyEngine* self, const nb::bytes& bundle, const nb::bytes& onnxruntime_library,
                 const std::optional<nb::bytes>& ops_library, uint64_t max_tokens,
                 uint32_t prefill_chunk, uint32_t threads, bool spin, bool verify,
                 const std::optional<std::string>& device,
                 const std::optional<nb::bytes>& cuda_library) {
    EngineOptions options;
    options.bundle = path_of(bundle);
    options.graph.onnxruntime_library = path_of(onnxruntime_library);
    if (ops_library) options.graph.ops_library = path_of(*ops_library);
    options.graph.threads = threads;
    options.graph.spin = spin;
    options.max_tokens = max_tokens;
    options.prefill_chunk = prefill_chunk;
    options.verify = verify;
    if (device) options.device = device_of(*device);
    if (cuda_library) options.cuda_library = path_of(*cuda_library);
    std::shared_ptr<Engine> engine;
    {
        const nb::gil_scoped_release release;
        engine = std::make_shared<Engine>(options);
    }
    new (self) PyEngine{std::move(engine)};
}

// (session, ids, positions, logits): what one session does in a step. The arrays live as long as
// the tuple.
Request request_of(const PyEngine& self, const nb::tuple& given, std::vector<mla_token>& tokens) {
    const auto& session = nb::cast<const PySession&>(given[0]);
    const auto positions = nb::cast<TokenArray>(given[2]);
    const auto logits = nb::cast<LogitArray>(given[3], false);
    if (&session.engine() != self.engine.get()) {
        throw invalid("a session belongs to the engine that made it");
    }
    tokens = tokens_of(*self.engine, nb::cast<TokenArray>(given[1]));
    self.engine->check_tokens(tokens.data(), tokens.size());
    Request request{session.session.get(), tokens.data(), tokens.size(), {}, logits.data()};
    for (size_t i = 0; i < positions.size(); ++i) {
        const int64_t position = positions.data()[i];
        if (position < 0) throw Engine::not_a_position(position, tokens.size());
        request.positions.push_back(static_cast<size_t>(position));
    }
    if (logits.shape(0) != positions.size() || logits.shape(1) != self.engine->model().vocab_size) {
        throw nb::value_error("logits must have shape [positions, vocab_size]");
    }
    return request;
}

void step(const PyEngine& self, const std::vector<nb::tuple>& given, Cancellation* cancellation) {
    std::vector<std::vector<mla_token>> tokens(given.size());
    std::vector<Request> requests;
    size_t count = 0;
    for (size_t i = 0; i < given.size(); ++i) {
        requests.push_back(request_of(self, given[i], tokens[i]));
        count += tokens[i].size();
    }
    Engine& engine = *self.engine;
    interruptible(count > engine.prefill_chunk(), cancellation,
                  [&](Cancellation* cancel) { engine.step(requests, cancel); });
}

void bind_engine_class(nb::module_& m) {
    nb::class_<PyEngine>(m, "Engine", "A bundle in memory, and the cache that its sessions share.")
        .def("__init__", &open_engine, "bundle"_a, "onnxruntime_library"_a, "ops_library"_a.none(),
             "max_tokens"_a, "prefill_chunk"_a, "threads"_a, "spin"_a, "verify"_a,
             "device"_a.none(), "cuda_library"_a.none(),
             "Paths as os.fsencode gives them; the numbers as in runtime.h, 0 for the default.")
        .def_prop_ro(
            "capacity_tokens", [](const PyEngine& self) { return self.engine->capacity_tokens(); },
            "Tokens that the cache holds, of all sessions together.")
        .def_prop_ro(
            "free_tokens", [](const PyEngine& self) { return self.engine->free_tokens(); }, NoGil(),
            "Of these, those in pages that no session uses now.")
        .def_prop_ro(
            "bytes_per_token", [](const PyEngine& self) { return self.engine->bytes_per_token(); },
            "Bytes of cache for one token, in all layers.")
        .def_prop_ro(
            "onnxruntime_version",
            [](const PyEngine& self) { return self.engine->onnxruntime_version(); },
            "The version of the library that runs the graph.")
        .def(
            "session", [](const PyEngine& self) { return PySession{self.engine->session()}; },
            "An empty session.")
        .def(
            "load_session",
            [](const PyEngine& self, const nb::bytes& path) {
                const std::string file = path_of(path);
                const nb::gil_scoped_release release;
                return session_failure_if(
                    MLA_FILE_ERROR, [&] { return PySession{load_session(*self.engine, file)}; });
            },
            "path"_a, "A session that Session.save wrote to a file.")
        .def(
            "check_tokens",
            [](const PyEngine& self, const TokenArray& ids) {
                const std::vector<mla_token> tokens = tokens_of(*self.engine, ids);
                self.engine->check_tokens(tokens.data(), tokens.size());
            },
            "ids"_a, nb::sig("def check_tokens(self, ids: object) -> None"),
            "Whether there are ids, and all are of the model. ids: int64 [count].")
        .def("step", &step, "requests"_a, "cancellation"_a.none() = nb::none(),
             nb::sig("def step(self, requests: collections.abc.Sequence[tuple[Session, object, "
                     "object, object]], "
                     "cancellation: Cancellation | None = None) -> None"),
             "Appends tokens to several sessions at once; each request is (session, ids, "
             "positions,\n"
             "logits): int64 [count] and int64 [positions] in, float32 [positions, vocab_size] "
             "out.");
}

void bind_session_class(nb::module_& m) {
    const auto info = [](const PySession& self) { return self.engine().info(*self.session); };
    nb::class_<PySession>(m, "Session", "A sequence of tokens in the cache.")
        .def_prop_ro(
            "length", [=](const PySession& self) { return info(self).length; }, NoGil(),
            "Tokens in the cache.")
        .def_prop_ro(
            "room", [=](const PySession& self) { return info(self).room; }, NoGil(),
            "Tokens that can be added now.")
        .def_prop_ro(
            "cache_bytes", [=](const PySession& self) { return info(self).cache_bytes; }, NoGil(),
            "Bytes of its pages, those shared with forks included.")
        .def(
            "tokens", [](const PySession& self) { return self.engine().tokens(*self.session); },
            NoGil(), "The tokens in the cache.")
        .def(
            "common_prefix",
            [](const PySession& self, const TokenArray& ids) {
                const std::vector<mla_token> tokens = tokens_of(self.engine(), ids);
                const nb::gil_scoped_release release;
                return self.engine().common_prefix(*self.session, tokens.data(), tokens.size());
            },
            "ids"_a, nb::sig("def common_prefix(self, ids: object) -> int"),
            "How many of the ids, int64 [count], the session holds at its start.")
        .def(
            "rewind",
            [](const PySession& self, int64_t length) {
                session_failure_if(MLA_INVALID_ARGUMENT, [&] {
                    if (length < 0)
                        throw Engine::not_a_length(length,
                                                   self.engine().info(*self.session).length);
                    self.engine().rewind(*self.session, static_cast<size_t>(length));
                });
            },
            "length"_a, NoGil(), "Forgets all tokens but the first ones.")
        .def(
            "fill_by_copies",
            [](const PySession& self, uint64_t length) {
                session_failure_if(MLA_INVALID_ARGUMENT,
                                   [&] { self.engine().fill_by_copies(*self.session, length); });
            },
            "length"_a, NoGil(), "Grows by copies of whole pages, without computing.")
        .def(
            "fork",
            [](const PySession& self) { return PySession{self.engine().fork(*self.session)}; },
            NoGil(), "Another session of the same tokens and pages.")
        .def(
            "save",
            [](const PySession& self, const nb::bytes& path) {
                const std::string file = path_of(path);
                const nb::gil_scoped_release release;
                save_session(*self.session, file);
            },
            "path"_a, "Writes the session to a file, whole or not at all.");
}

}  // namespace

void bind_engine(nb::module_& m) {
    register_errors();
    nb::class_<Cancellation>(m, "Cancellation",
                             "Stops the calls of other threads that were given it.\n\n"
                             "Once requested it stays so: make one for each request.")
        .def(nb::init<>())
        .def("request", &Cancellation::request, NoGil(),
             "Stop the calls that were given it, in the midst of the graph too, and those that\n"
             "will be. Returns at once.")
        .def_prop_ro("requested", &Cancellation::requested, "Whether `request` was called.");
    bind_session_class(m);
    bind_engine_class(m);
}
