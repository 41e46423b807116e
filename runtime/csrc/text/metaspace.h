// The fields that the pre-tokenizer and the decoder Metaspace share.
#pragma once

#include <string>

#include "text/config.h"
#include "text/utf8.h"

namespace mla::text {

enum class PrependScheme { kAlways, kFirst, kNever };

// Files from before 2024 have add_prefix_space instead, or too; the two must agree.
inline PrependScheme read_prepend_scheme(const Config& config) {
    PrependScheme scheme = PrependScheme::kAlways;
    if (const auto found = config.find("prepend_scheme")) {
        if (found->text() == "first") {
            scheme = PrependScheme::kFirst;
        } else if (found->text() == "never") {
            scheme = PrependScheme::kNever;
        } else if (found->text() != "always") {
            throw found->bad("always, first or never");
        }
    }
    if (!config.boolean("add_prefix_space", true) && scheme != PrependScheme::kNever) {
        throw config.at("add_prefix_space").bad("true, or \"prepend_scheme\": \"never\" with it");
    }
    return scheme;
}

// A string of one character.
inline const std::string& read_character(const Config& config) {
    const std::string& text = config.text();
    const bool one =
        !text.empty() &&
        text.size() == static_cast<size_t>(utf8_length(static_cast<unsigned char>(text[0])));
    if (!one) throw config.bad("one character");
    return text;
}

}  // namespace mla::text
