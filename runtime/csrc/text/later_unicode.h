// PCRE2 10.42 knows Unicode 14, tokenizers 16. Before matching, the 10302 code points that differ
// are replaced by older ones of the same category and length, so that all offsets stay.
#pragma once

#include <string>
#include <string_view>

namespace mla::text {

// `text`, or `copy` filled with its stand-in.
std::string_view with_known_characters(std::string_view text, std::string& copy);

}  // namespace mla::text
