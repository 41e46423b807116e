// The errors of reading tokenizer.json.
#pragma once

#include <string>
#include <utility>

#include "core/error.h"

namespace mla::text {

using core::Error;
using core::invalid;
using core::join;

inline Error bad_tokenizer(std::string what) {
    return Error(MLA_BAD_TOKENIZER, "tokenizer.json is not valid: " + std::move(what));
}

// Valid, but not ours.
inline Error unsupported(std::string what) {
    return Error(MLA_UNSUPPORTED, "tokenizer.json is not supported: " + std::move(what))
        .next("encode and decode in Python, with the package tokenizers");
}

}  // namespace mla::text
