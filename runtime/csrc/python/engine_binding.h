// Engines and sessions as Python holds them, and how a long call of Python's runs.
//
// The classes of the core are bound directly, from the static library mla_core, not the C ABI that
// is made of them. Through the ABI an error would be a text to take apart again, a session a number
// to look up, and a generation a callback that cannot pause; and the wheel would need
// libmla_deploy.
//
// The GIL is released before anything waits for the engine, and nothing takes it while the engine
// is held: whoever holds the one never waits for the other.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <chrono>
#include <future>
#include <memory>
#include <vector>

#include "core/cancellation.h"
#include "core/engine.h"

struct PyEngine {
    std::shared_ptr<mla::core::Engine> engine;
};

struct PySession {
    std::shared_ptr<mla::core::Session> session;

    mla::core::Engine& engine() const { return session->engine(); }
};

using TokenArray =
    nanobind::ndarray<const int64_t, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;

// The ids as the core takes them. Errors: MLA_INVALID_ARGUMENT, for one that is not of the model.
inline std::vector<mla_token> tokens_of(const mla::core::Engine& engine, const TokenArray& ids) {
    const int64_t vocab_size = engine.model().vocab_size;
    std::vector<mla_token> tokens;
    tokens.reserve(ids.size());
    for (size_t i = 0; i < ids.size(); ++i) {
        const int64_t id = ids.data()[i];
        if (id < 0 || id >= vocab_size) throw engine.not_in_vocabulary(id);
        tokens.push_back(static_cast<mla_token>(id));
    }
    return tokens;
}

// Runs body(cancellation) without the GIL. is_long: in another thread, while this one watches for
// Python's signals, so that Ctrl-C ends it: a prompt may take minutes.
template <class Body>
void interruptible(bool is_long, mla::core::Cancellation* cancellation, const Body& body) {
    if (!is_long) {
        const nanobind::gil_scoped_release release;
        body(cancellation);
        return;
    }
    constexpr std::chrono::milliseconds kInterval{50};
    mla::core::Cancellation own;
    if (cancellation == nullptr) cancellation = &own;
    std::future<void> done = std::async(std::launch::async, [&] { body(cancellation); });
    const auto wait = [&] {
        const nanobind::gil_scoped_release release;
        return done.wait_for(kInterval) == std::future_status::ready;
    };
    while (!wait()) {
        if (PyErr_CheckSignals() == 0) continue;
        nanobind::python_error interrupt;
        cancellation->request();
        while (!wait()) {
        }
        throw interrupt;
    }
    done.get();
}
