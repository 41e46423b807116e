// The core's errors as exceptions of mla_deploy.errors.
#pragma once

#include <utility>

#include "core/error.h"

// An error of a session, whatever its status says in general.
struct SessionFailure {
    mla::core::Error error;
};

// Runs the body; an error of that status is one of the session.
template <class Body>
decltype(auto) session_failure_if(mla_status status, const Body& body) {
    try {
        return body();
    } catch (mla::core::Error& error) {
        if (error.status() != status) throw;
        throw SessionFailure{std::move(error)};
    }
}

// To be called once, when the module is made.
void register_errors();
