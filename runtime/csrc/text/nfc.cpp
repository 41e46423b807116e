#include "text/nfc.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "text/utf8.h"

namespace mla::text {
namespace {

struct Decomposition {
    char32_t code, parts[4];  // fully decomposed, zeros behind
};
struct Composition {
    char32_t first, second, whole;
};
struct CombiningClass {
    char32_t first, last;
    uint8_t value;
};
// Characters that NFC may change, or that may change what stands before them. Between two others
// the text can be cut and each part normalized alone.
struct Unstable {
    char32_t first, last;
};
#include "text/nfc_tables.inc"

constexpr char32_t kFirstUnstable = 0x300;

template <class Range, size_t N>
const Range* find_range(const Range (&ranges)[N], char32_t code) {
    const auto* found =
        std::lower_bound(std::begin(ranges), std::end(ranges), code,
                         [](const Range& range, char32_t c) { return range.last < c; });
    return found != std::end(ranges) && found->first <= code ? found : nullptr;
}

int combining_class(char32_t code) {
    const auto* found = find_range(kClasses, code);
    return found ? found->value : 0;
}

bool is_stable(char32_t code) { return code < kFirstUnstable || !find_range(kUnstable, code); }

// Hangul is composed by arithmetic: 19 leads x 21 vowels x 28 finals, of which one is none.
constexpr char32_t kSyllables = 0xac00, kLeads = 0x1100, kVowels = 0x1161, kFinals = 0x11a7;
constexpr char32_t kLeadCount = 19, kVowelCount = 21, kFinalCount = 28;

void decompose(char32_t code, std::vector<char32_t>& out) {
    if (code >= kSyllables && code < kSyllables + kLeadCount * kVowelCount * kFinalCount) {
        const char32_t index = code - kSyllables;
        out.push_back(kLeads + index / (kVowelCount * kFinalCount));
        out.push_back(kVowels + index / kFinalCount % kVowelCount);
        if (index % kFinalCount) out.push_back(kFinals + index % kFinalCount);
        return;
    }
    const auto* found =
        std::lower_bound(std::begin(kDecompositions), std::end(kDecompositions), code,
                         [](const Decomposition& d, char32_t c) { return d.code < c; });
    if (found == std::end(kDecompositions) || found->code != code) {
        out.push_back(code);
        return;
    }
    for (const char32_t part : found->parts) {
        if (part) out.push_back(part);
    }
}

// 0 if the two do not compose.
char32_t compose(char32_t first, char32_t second) {
    if (first >= kLeads && first < kLeads + kLeadCount && second >= kVowels &&
        second < kVowels + kVowelCount) {
        return kSyllables + ((first - kLeads) * kVowelCount + (second - kVowels)) * kFinalCount;
    }
    if (first >= kSyllables && first < kSyllables + kLeadCount * kVowelCount * kFinalCount &&
        (first - kSyllables) % kFinalCount == 0 && second > kFinals &&
        second < kFinals + kFinalCount) {
        return first + (second - kFinals);
    }
    const auto* found =
        std::lower_bound(std::begin(kCompositions), std::end(kCompositions), first,
                         [&](const Composition& c, char32_t) {
                             return c.first != first ? c.first < first : c.second < second;
                         });
    return found != std::end(kCompositions) && found->first == first && found->second == second
               ? found->whole
               : 0;
}

// Unicode's algorithm on one part: decompose, order the marks, compose with the last starter what
// nothing blocks.
void normalize_part(std::vector<char32_t>& part, std::string& out) {
    std::vector<char32_t> codes;
    for (const char32_t code : part) decompose(code, codes);
    part.clear();
    for (size_t begin = 0; begin < codes.size();) {
        size_t end = begin;
        while (end < codes.size() && combining_class(codes[end])) ++end;
        std::stable_sort(codes.begin() + begin, codes.begin() + end, [](char32_t a, char32_t b) {
            return combining_class(a) < combining_class(b);
        });
        begin = std::max(end, begin + 1);
    }
    size_t size = 0;
    size_t starter = SIZE_MAX;
    int last_class = -1;  // of what stands between the starter and here; -1: nothing does
    for (const char32_t code : codes) {
        const int own_class = combining_class(code);
        if (starter != SIZE_MAX && last_class < own_class) {
            if (const char32_t whole = compose(codes[starter], code)) {
                codes[starter] = whole;
                continue;
            }
        }
        if (own_class == 0) {
            starter = size;
            last_class = -1;
        } else {
            last_class = own_class;
        }
        codes[size++] = code;
    }
    for (size_t i = 0; i < size; ++i) append_utf8(out, codes[i]);
}

}  // namespace

std::string to_nfc(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    std::vector<char32_t> part;  // a stable character and the unstable ones after it
    size_t copied = 0;           // text before it is done
    size_t stable_at = 0;        // begin of the last stable character
    bool dirty = false;          // unstable ones have come since
    for (size_t at = 0; at <= text.size();) {
        const size_t begin = at;
        const bool end = at == text.size();
        if (!end && !is_stable(next_code_point(text, at))) {
            dirty = true;
            continue;
        }
        if (dirty) {
            out.append(text.substr(copied, stable_at - copied));
            for (size_t i = stable_at; i < begin;) part.push_back(next_code_point(text, i));
            normalize_part(part, out);
            copied = begin;
            dirty = false;
        }
        stable_at = begin;
        if (end) break;
    }
    out.append(text.substr(copied));
    return out;
}

}  // namespace mla::text
