#include "text/nfc.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <memory>
#include <new>

#include "text/error.h"
#include "text/utf8.h"

namespace mla::text {
namespace {

// Characters to which a later Unicode gave a combining class or a composition, and which tokenizers
// therefore leaves where they are.
struct LaterMarks {
    char32_t first, last;
};
#include "text/later_marks.inc"

// Below it nothing changes: the first combining mark.
constexpr char32_t kFirstMark = 0x300;

// utf8proc sorts marks by insertion. Unicode's own stream-safe format has at most 30 in a row.
constexpr int kMostMarks = 10000;

bool is_later(char32_t code) {
    const auto* found =
        std::lower_bound(std::begin(kLaterMarks), std::end(kLaterMarks), code,
                         [](const LaterMarks& range, char32_t c) { return range.last < c; });
    return found != std::end(kLaterMarks) && found->first <= code;
}

void append_nfc(std::string_view text, std::string& out) {
    utf8proc_uint8_t* composed = nullptr;
    const utf8proc_ssize_t size =
        utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                     static_cast<utf8proc_ssize_t>(text.size()), &composed,
                     static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
    const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(composed, std::free);
    if (size == UTF8PROC_ERROR_NOMEM) throw std::bad_alloc();
    if (size < 0) {
        throw Error(MLA_INTERNAL, "the text cannot be normalized").found(utf8proc_errmsg(size));
    }
    out.append(reinterpret_cast<const char*>(composed), static_cast<size_t>(size));
}

}  // namespace

std::string to_nfc(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    size_t done = 0;
    bool changes = false;  // what is not done may
    const auto finish = [&](size_t end) {
        const std::string_view part = text.substr(done, end - done);
        if (changes) {
            append_nfc(part, out);
        } else {
            out += part;
        }
        changes = false;
    };
    int marks = 0;
    for (size_t at = 0; at < text.size();) {
        const size_t begin = at;
        const char32_t code = next_code_point(text, at);
        if (code < kFirstMark) {
            marks = 0;
            continue;
        }
        if (is_later(code)) {  // nothing passes it, and nothing composes with it
            finish(begin);
            out += text.substr(begin, at - begin);
            done = at;
            marks = 0;
            continue;
        }
        changes = true;
        const auto* property = utf8proc_get_property(static_cast<utf8proc_int32_t>(code));
        marks = property->combining_class > 0 ? marks + 1 : 0;
        if (marks > kMostMarks) {
            throw invalid("the text has too many combining marks in a row")
                .found("the last of them at byte ", begin)
                .allowed("up to ", kMostMarks);
        }
    }
    finish(text.size());
    return out;
}

}  // namespace mla::text
