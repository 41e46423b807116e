// Classes of single characters.
#pragma once

namespace mla::text {

// The property White_Space.
bool is_space(char32_t code);

// \w of Unicode's regular expressions: Alphabetic, marks, digits, connectors, joiners.
bool is_word(char32_t code);

}  // namespace mla::text
