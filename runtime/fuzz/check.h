// What every fuzz target needs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "core/error.h"

namespace mla::fuzz {

inline void check(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::abort();
}

// Whether `body` ends without an Error, each of which must have a text. Any other exception is one
// that the target dies of.
template <class Body>
bool succeeds(const Body& body) {
    try {
        body();
        return true;
    } catch (const core::Error& error) {
        check(error.status() != MLA_OK && error.what()[0] != '\0', "an error without text");
        return false;
    }
}

}  // namespace mla::fuzz
