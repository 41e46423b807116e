#include "text/characters.h"

#include <string>
#include <vector>

#include "text/regex.h"
#include "text/utf8.h"

namespace mla::text {
namespace {

// All word characters, found in one go by the expression that knows them.
std::vector<bool> find_word_characters() {
    std::string all;
    std::vector<bool> found(0x110000);
    for (char32_t code = 0; code < 0x110000; ++code) {
        if (code < 0xd800 || code > 0xdfff) append_utf8(all, code);
    }
    const Regex word = Regex::parse(R"([\w\x{200c}\x{200d}]+)", "is_word");
    MatchMemory memory;
    std::vector<Span> runs;
    word.find_all(all, memory, runs);
    for (const Span& run : runs) {
        for (size_t at = run.begin; at < run.end;) found[next_code_point(all, at)] = true;
    }
    return found;
}

}  // namespace

bool is_space(char32_t code) {
    if (code < 0x80) return code == ' ' || (code >= 9 && code <= 13);
    return code == 0x85 || code == 0xa0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200a) ||
           code == 0x2028 || code == 0x2029 || code == 0x202f || code == 0x205f || code == 0x3000;
}

bool is_word(char32_t code) {
    static const std::vector<bool> words = find_word_characters();
    return code < words.size() && words[code];
}

}  // namespace mla::text
