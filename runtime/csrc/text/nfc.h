// Unicode normalization form C.
#pragma once

#include <string>
#include <string_view>

namespace mla::text {

// As tokenizers has it, whose tables are of an older Unicode than its regular expressions.
// Errors: MLA_INVALID_ARGUMENT for absurdly many combining marks in a row.
std::string to_nfc(std::string_view text);

}  // namespace mla::text
