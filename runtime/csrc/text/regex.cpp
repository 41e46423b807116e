#include "text/regex.h"

#include "text/error.h"
#include "text/later_unicode.h"
#include "text/regex_syntax.h"
#include "text/utf8.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace mla::text {

template <class T, void (*Free)(T*)>
struct Pcre2Deleter {
    void operator()(T* pointer) const { Free(pointer); }
};
template <class T, void (*Free)(T*)>
using Owned = std::unique_ptr<T, Pcre2Deleter<T, Free>>;

namespace {

// Backtracking into a long run takes memory; this is enough for millions of characters.
constexpr size_t kJitStackBytes = size_t{16} << 20;

std::string pcre2_message(int code) {
    PCRE2_UCHAR text[256];
    return pcre2_get_error_message(code, text, sizeof text) < 0 ? join("error ", code)
                                                                : reinterpret_cast<char*>(text);
}

}  // namespace

struct MatchMemory::Impl {
    Owned<pcre2_match_data, pcre2_match_data_free> data;
    Owned<pcre2_jit_stack, pcre2_jit_stack_free> stack;
    Owned<pcre2_match_context, pcre2_match_context_free> context;
    std::string stand_in;
};

MatchMemory::MatchMemory() : impl_(std::make_unique<Impl>()) {
    impl_->data.reset(pcre2_match_data_create(1, nullptr));
    impl_->context.reset(pcre2_match_context_create(nullptr));
    if (!impl_->data || !impl_->context) throw std::bad_alloc();
    impl_->stack.reset(pcre2_jit_stack_create(32 << 10, kJitStackBytes, nullptr));  // null: no JIT
    if (impl_->stack) pcre2_jit_stack_assign(impl_->context.get(), nullptr, impl_->stack.get());
}

MatchMemory::~MatchMemory() = default;

struct Regex::Code {
    Owned<pcre2_code, pcre2_code_free> compiled;
    bool jit = false;
    bool categories = false;  // asks for general categories, which depend on the Unicode version
};

Regex Regex::compile(const std::string& pcre2, const std::string& where) {
    Owned<pcre2_compile_context, pcre2_compile_context_free> context(
        pcre2_compile_context_create(nullptr));
    if (!context) throw std::bad_alloc();
    pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
    int error;
    PCRE2_SIZE offset;
    auto code = std::make_shared<Code>();
    code->compiled.reset(pcre2_compile(
        reinterpret_cast<PCRE2_SPTR>(pcre2.data()), pcre2.size(),
        PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_AUTO_CAPTURE,
        &error, &offset, context.get()));
    if (!code->compiled) {
        throw unsupported(join("the regular expression at ", where))
            .found(pcre2_message(error), " at offset ", offset, " of its translation ", pcre2);
    }
    code->jit = pcre2_jit_compile(code->compiled.get(), PCRE2_JIT_COMPLETE) == 0;
    code->categories =
        pcre2.find("\\p{") != std::string::npos || pcre2.find("\\P{") != std::string::npos;
    return Regex(std::move(code));
}

Regex Regex::parse(std::string_view pattern, const std::string& where) {
    return compile(to_pcre2(pattern, where), where);
}

Regex Regex::of_literal(std::string_view text, const std::string& where) {
    return compile(literal_to_pcre2(text), where);
}

void Regex::find_all(std::string_view original, MatchMemory& memory,
                     std::vector<Span>& matches) const {
    MatchMemory::Impl& own = *memory.impl_;
    const std::string_view text =
        code_->categories ? with_known_characters(original, own.stand_in) : original;
    const auto match = code_->jit ? pcre2_jit_match : pcre2_match;
    const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
    const PCRE2_SIZE* found = pcre2_get_ovector_pointer(own.data.get());
    size_t from = 0;
    size_t last_end = SIZE_MAX;
    while (from <= text.size()) {
        const int status = match(code_->compiled.get(), subject, text.size(), from,
                                 PCRE2_NO_UTF_CHECK, own.data.get(), own.context.get());
        if (status == PCRE2_ERROR_NOMATCH) return;
        if (status < 0) {
            throw Error(MLA_TOO_COMPLEX,
                        "a pattern of tokenizer.json cannot be matched against the text")
                .found(pcre2_message(status), ", ", text.size() - from, " bytes before its end")
                .next("encode the text in shorter parts");
        }
        const Span span{found[0], found[1]};
        if (span.begin == span.end && span.end == last_end) {
            from += from < text.size() ? utf8_length(static_cast<unsigned char>(text[from])) : 1;
            continue;
        }
        matches.push_back(span);
        from = last_end = span.end;
    }
}

}  // namespace mla::text
