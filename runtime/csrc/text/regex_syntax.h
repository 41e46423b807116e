// From the regular expressions of tokenizers (Oniguruma, Ruby's syntax) to those of PCRE2.
#pragma once

#include <string>
#include <string_view>

namespace mla::text {

// A PCRE2 pattern that matches the same, to be compiled with UTF, UCP and MULTILINE. The two
// syntaxes look alike and differ in meaning (\h, \s, \v, {n}+, (?m), [a&&b], [a[b]]), so every
// construct is parsed, and one that is not known to mean the same gives MLA_UNSUPPORTED.
// where: the place of the pattern in tokenizer.json, for errors.
std::string to_pcre2(std::string_view pattern, const std::string& where);

// A PCRE2 pattern that matches `text` itself.
std::string literal_to_pcre2(std::string_view text);

}  // namespace mla::text
