#include "text/later_unicode.h"

#include <algorithm>
#include <bitset>
#include <iterator>

#include "text/utf8.h"

namespace mla::text {
namespace {

struct Later {
    char32_t first, last, stand_in;
};
#include "text/later_unicode.inc"

const Later* find_later(char32_t code) {
    // Blocks of 64 that hold any: nearly all text is decided here.
    static const std::bitset<0x110000 / 64> blocks = [] {
        std::bitset<0x110000 / 64> bits;
        for (const Later& range : kLater) {
            for (char32_t block = range.first / 64; block <= range.last / 64; ++block)
                bits.set(block);
        }
        return bits;
    }();
    if (!blocks[code / 64]) return nullptr;
    const auto found =
        std::lower_bound(std::begin(kLater), std::end(kLater), code,
                         [](const Later& range, char32_t c) { return range.last < c; });
    return found != std::end(kLater) && found->first <= code ? found : nullptr;
}

}  // namespace

std::string_view with_known_characters(std::string_view text, std::string& copy) {
    bool copied = false;
    for (size_t at = 0; at < text.size();) {
        const size_t begin = at;
        // The first is U+0897, which begins with 0xe0.
        if (static_cast<unsigned char>(text[at]) < 0xe0) {
            ++at;
            continue;
        }
        const Later* later = find_later(next_code_point(text, at));
        if (!later) continue;
        if (!copied) copy = text;
        copied = true;
        std::string character;
        append_utf8(character, later->stand_in);
        copy.replace(begin, at - begin, character);
    }
    return copied ? std::string_view(copy) : text;
}

}  // namespace mla::text
