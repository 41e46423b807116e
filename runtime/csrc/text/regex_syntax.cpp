#include "text/regex_syntax.h"

#include <cstdint>
#include <set>
#include <vector>

#include "text/error.h"
#include "text/utf8.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace mla::text {
namespace {

#define PCRE2_HAS_BOOLEAN_PROPERTIES (PCRE2_MAJOR > 10 || PCRE2_MINOR >= 40)

// Oniguruma's \s is the property White_Space, \h a hexadecimal digit. PCRE2's \s has U+180E too.
constexpr char kSpace[] =
    R"(\x09-\x0d\x20\x85\xa0\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";
constexpr char kNotSpace[] =
    R"(\x00-\x08\x0e-\x1f\x21-\x84\x86-\x9f\xa1-\x{167f}\x{1681}-\x{1fff}\x{200b}-\x{2027})"
    R"(\x{202a}-\x{202e}\x{2030}-\x{205e}\x{2060}-\x{2fff}\x{3001}-\x{10ffff})";
constexpr char kHex[] = "0-9A-Fa-f";
constexpr char kNotHex[] = R"(\x00-/:-@G-`g-\x{10ffff})";
#if PCRE2_HAS_BOOLEAN_PROPERTIES
constexpr char kWord[] = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc})";
constexpr char kScript[] = "sc:";  // without it, script extensions are meant
#else
constexpr char kScript[] = "";
#endif

const std::set<std::string, std::less<>> kCategories = {
    "C",  "Cc", "Cf", "Cn", "Co", "L",  "Ll", "Lm", "Lo", "Lt", "Lu", "M",
    "Mc", "Me", "Mn", "N",  "Nd", "Nl", "No", "P",  "Pc", "Pd", "Pe", "Pf",
    "Pi", "Po", "Ps", "S",  "Sc", "Sk", "Sm", "So", "Z",  "Zl", "Zp", "Zs"};
const std::set<std::string, std::less<>> kScripts = {
    "Arabic",   "Armenian",  "Bengali",   "Bopomofo", "Common",   "Cyrillic", "Devanagari",
    "Ethiopic", "Georgian",  "Greek",     "Gujarati", "Gurmukhi", "Han",      "Hangul",
    "Hebrew",   "Hiragana",  "Inherited", "Kannada",  "Katakana", "Khmer",    "Lao",
    "Latin",    "Malayalam", "Mongolian", "Myanmar",  "Oriya",    "Sinhala",  "Tamil",
    "Telugu",   "Thai",      "Tibetan",   "Yi"};

constexpr int kMaxNesting = 50;

std::string literal(char32_t code) {
    if ((code >= '0' && code <= '9') || (code >= 'A' && code <= 'Z') ||
        (code >= 'a' && code <= 'z')) {
        return std::string(1, static_cast<char>(code));
    }
    char text[16];
    std::snprintf(text, sizeof text, "\\x{%x}", static_cast<unsigned>(code));
    return text;
}

class Translator {
  public:
    Translator(std::string_view pattern, const std::string& where)
        : where_(where), pattern_(pattern) {
        for (size_t i = 0; i < pattern.size();) in_.push_back(next_code_point(pattern, i));
    }

    std::string run() {
        const bool caseless = eat("(?i)");  // elsewhere its reach differs
        std::string body = alternatives(0);
        if (at_ < in_.size()) throw refuse("a ) without its (");
        return caseless ? "(?i:" + body + ")" : body;
    }

  private:
    // ---- input ----
    bool done() const { return at_ >= in_.size(); }
    char32_t peek(size_t ahead = 0) const {
        return at_ + ahead < in_.size() ? in_[at_ + ahead] : 0;
    }
    bool eat(const char* text) {
        size_t n = 0;
        for (; text[n]; ++n) {
            if (at_ + n >= in_.size() || in_[at_ + n] != static_cast<unsigned char>(text[n]))
                return false;
        }
        at_ += n;
        return true;
    }
    char32_t take() {
        if (done()) throw refuse("the end within a construct");
        return in_[at_++];
    }
    Error refuse(const std::string& what) const {
        return unsupported(join("the regular expression at ", where_))
            .found(what, ", before offset ", at_, " of ", pattern_)
            .allowed(
                "literals, . ^ $ |, (?:) (?i:) (?>) and lookaround, greedy, lazy and possessive "
                "repeats, classes with ranges, && and nesting, \\p{category or script} and "
                "\\s \\d \\w \\h \\n \\r \\t \\u");
    }

    // ---- structure ----
    std::string alternatives(int depth) {
        if (depth > kMaxNesting) throw refuse(join("more than ", kMaxNesting, " nested groups"));
        std::string out;
        while (!done() && peek() != ')') {
            if (eat("|")) {
                out += '|';
                continue;
            }
            const size_t start = out.size();
            const bool repeatable = atom(out, depth);
            quantifier(out, start, repeatable);
        }
        return out;
    }

    // Appends one atom; false if it is an anchor, which nothing may repeat.
    bool atom(std::string& out, int depth) {
        const char32_t c = take();
        switch (c) {
            case '(':
                return group(out, depth);
            case '[':
                out += char_class(depth);
                return true;
            case '\\':
                return escape(out);
            case '^':
            case '$':
                out += static_cast<char>(c);
                return false;
            case '.':
                out += '.';
                return true;
            case '*':
            case '+':
            case '?':
                throw refuse("a repeat of nothing");
            case ']':
                throw refuse("a ] without its [");
            default:
                out += literal(c);
                return true;
        }
    }

    bool group(std::string& out, int depth) {
        bool repeatable = true;
        if (peek() != '?') {
            out += "(?:";  // nothing refers to groups
        } else {
            static constexpr const char* kSame[] = {"?:", "?>", "?i:", "?-i:"};
            static constexpr const char* kLook[] = {"?=", "?!", "?<=", "?<!"};
            const char* found = nullptr;
            for (const char* open : kSame) {
                if (!found && eat(open)) found = open;
            }
            for (const char* open : kLook) {
                if (!found && eat(open)) {
                    found = open;
                    repeatable = false;
                }
            }
            if (!found && eat("?m:")) found = "?s:";  // Ruby's m lets . match a newline
            if (!found) throw refuse("a group of an unknown kind");
            out += '(';
            out += found;
        }
        out += alternatives(depth + 1);
        if (!eat(")")) throw refuse("a ( without its )");
        out += ')';
        return repeatable;
    }

    void quantifier(std::string& out, size_t start, bool repeatable) {
        std::string repeat;
        bool interval = false;
        if (peek() == '*' || peek() == '+' || peek() == '?') {
            repeat = static_cast<char>(take());
        } else if (peek() == '{' && read_interval(repeat)) {
            interval = true;
        } else {
            return;
        }
        if (!repeatable) throw refuse("a repeat of an anchor or lookaround");
        out += repeat;
        if (peek() == '?') {
            if (interval && repeat.find(',') == std::string::npos) throw refuse("{n}?");
            out += static_cast<char>(take());
        } else if (peek() == '+') {
            take();
            if (interval) {  // no possessive repeat in Ruby's syntax, but a repeat of the repeat
                out.insert(start, "(?:");
                out += ")+";
            } else {
                out += '+';
            }
        }
        if (peek() == '*' || peek() == '+' || peek() == '?') throw refuse("a repeat of a repeat");
        std::string more;
        if (peek() == '{' && read_interval(more)) throw refuse("a repeat of a repeat");
    }

    // {n}, {n,}, {,m}, {n,m}; false and nothing read for a { that means itself.
    bool read_interval(std::string& repeat) {
        const size_t start = at_;
        ++at_;
        const auto number = [&] {
            std::string digits;
            while (peek() >= '0' && peek() <= '9') digits += static_cast<char>(take());
            return digits;
        };
        const std::string least = number();
        const bool comma = eat(",");
        const std::string most = comma ? number() : "";
        if (!eat("}") || (least.empty() && most.empty())) {
            at_ = start;
            return false;
        }
        if (least.size() > 4 || most.size() > 4) throw refuse("a repeat of more than 9999");
        repeat = "{" + (least.empty() ? "0" : least) + (comma ? "," + most : "") + "}";
        return true;
    }

    // ---- escapes ----
    // A code point, if the escape after the backslash is one.
    bool escaped_code(char32_t& code) {
        const char32_t c = take();
        const auto hex = [&](int least, int most) {
            char32_t value = 0;
            int digits = 0;
            for (; digits < most; ++digits) {
                const char32_t d = peek();
                const int digit = d >= '0' && d <= '9'   ? static_cast<int>(d - '0')
                                  : d >= 'a' && d <= 'f' ? static_cast<int>(d - 'a' + 10)
                                  : d >= 'A' && d <= 'F' ? static_cast<int>(d - 'A' + 10)
                                                         : -1;
                if (digit < 0) break;
                value = value * 16 + static_cast<char32_t>(digit);
                ++at_;
            }
            if (digits < least) throw refuse("too few hexadecimal digits");
            return value;
        };
        switch (c) {
            case 'n':
                code = '\n';
                return true;
            case 'r':
                code = '\r';
                return true;
            case 't':
                code = '\t';
                return true;
            case 'f':
                code = '\f';
                return true;
            case 'v':
                code = '\v';
                return true;
            case 'a':
                code = '\a';
                return true;
            case 'e':
                code = 0x1b;
                return true;
            case 'u':
                code = hex(4, 4);
                break;
            case 'x':
                if (eat("{")) {
                    code = hex(1, 8);
                    if (!eat("}")) throw refuse("\\x{ without its }");
                } else if ((code = hex(1, 2)) >= 0x80) {
                    throw refuse("a byte of UTF-8");
                }
                break;
            default: {
                const bool word =
                    (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z');
                if (word || c >= 0x80 || c < 0x20) {
                    --at_;
                    return false;
                }
                code = c;
                return true;
            }
        }
        if (code > 0x10ffff || (code >= 0xd800 && code <= 0xdfff)) throw refuse("no code point");
        return true;
    }

    bool escape(std::string& out) {
        char32_t code;
        if (escaped_code(code)) {
            out += literal(code);
            return true;
        }
        switch (peek()) {
            case 'A':
            case 'z':
            case 'Z':
                out += '\\';
                out += static_cast<char>(take());
                return false;
#if PCRE2_HAS_BOOLEAN_PROPERTIES
            case 'W':
                take();
                out += join("[^", kWord, "]");
                return true;
#endif
            default:
                out += "[" + class_escape() + "]";
                return true;
        }
    }

    // \s and the like, as it is written within a class.
    std::string class_escape() {
        const char32_t c = take();
        switch (c) {
            case 's':
                return kSpace;
            case 'S':
                return kNotSpace;
            case 'h':
                return kHex;
            case 'H':
                return kNotHex;
            case 'd':
                return "\\p{Nd}";
            case 'D':
                return "\\P{Nd}";
            case 'p':
            case 'P':
                return property(c == 'P');
#if PCRE2_HAS_BOOLEAN_PROPERTIES
            case 'w':
                return kWord;
#endif
            default:
                throw refuse(join("\\", c < 0x80 ? std::string(1, static_cast<char>(c)) : "?"));
        }
    }

    std::string property(bool negated) {
        if (!eat("{")) throw refuse("\\p without {");
        if (eat("^")) negated = !negated;
        std::string name;
        while (!done() && peek() != '}') {
            if (peek() >= 0x80) throw refuse("\\p{" + name + "?}");
            name += static_cast<char>(take());
        }
        take();
        const char* open = negated ? "\\P{" : "\\p{";
        if (kCategories.count(name)) return open + name + "}";
        if (kScripts.count(name)) return open + std::string(kScript) + name + "}";
        throw refuse("\\p{" + name + "}");
    }

    // ---- classes ----
    // After the [: a PCRE2 class, or a group where sets are joined or intersected, in which the
    // parts are looked at first: [A&&B] becomes (?:(?=A)B).
    std::string char_class(int depth) {
        if (depth > kMaxNesting) throw refuse(join("more than ", kMaxNesting, " nested classes"));
        const bool negated = eat("^");
        std::vector<std::string> factors;
        bool plain = true;
        do {
            std::vector<std::string> nested;
            const std::string items = class_items(depth, nested);
            if (items.empty() && nested.empty()) throw refuse("an empty class");
            plain = plain && nested.empty();
            std::string factor = items.empty() ? "" : "[" + items + "]";
            for (const std::string& one : nested) factor += (factor.empty() ? "" : "|") + one;
            factors.push_back("(?:" + factor + ")");
            if (plain && peek() == ']') {  // the usual case
                take();
                return (negated ? "[^" : "[") + items + "]";
            }
            plain = false;
        } while (eat("&&"));
        take();
        std::string all;
        for (size_t i = 0; i + 1 < factors.size(); ++i) all += "(?=" + factors[i] + ")";
        all += factors.back();
        return negated ? "(?:(?!" + all + ")(?s:.))" : "(?:" + all + ")";
    }

    // Up to the ] or &&, which is left.
    std::string class_items(int depth, std::vector<std::string>& nested) {
        std::string out;
        for (;;) {
            if (done()) throw refuse("a [ without its ]");
            if (peek() == ']' || (peek() == '&' && peek(1) == '&')) return out;
            if (peek() == '[') {
                if (peek(1) == ':') throw refuse("[:");
                take();
                nested.push_back(char_class(depth + 1));
                continue;
            }
            char32_t first;
            if (!class_code(first)) {
                out += class_escape();
                if (peek() == '-' && peek(1) != ']')
                    throw refuse("a range that begins with a class");
                continue;
            }
            out += literal(first);
            // A range, unless the - comes last.
            if (peek() != '-' || peek(1) == ']' || at_ + 1 >= in_.size()) continue;
            take();
            char32_t last;
            if (peek() == '[' || (peek() == '&' && peek(1) == '&') || !class_code(last)) {
                throw refuse("a range that ends in no character");
            }
            if (last < first) throw refuse("a range that ends before it begins");
            out += "-" + literal(last);
        }
    }

    bool class_code(char32_t& code) {
        if (peek() != '\\') {
            code = take();
            return true;
        }
        take();
        return escaped_code(code);
    }

    const std::string& where_;
    std::string_view pattern_;
    std::vector<char32_t> in_;
    size_t at_ = 0;
};

}  // namespace

std::string to_pcre2(std::string_view pattern, const std::string& where) {
    return Translator(pattern, where).run();
}

std::string literal_to_pcre2(std::string_view text) {
    std::string out;
    for (size_t at = 0; at < text.size();) out += literal(next_code_point(text, at));
    return out;
}

}  // namespace mla::text
