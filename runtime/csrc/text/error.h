// Errors inside the text library: a status, and a text that says what to do.
#pragma once

#include <exception>
#include <sstream>
#include <string>
#include <utility>

#include "mla_deploy/text.h"

namespace mla::text {

// The arguments as one text: join("token ", 3).
template <class... Parts>
std::string join(const Parts&... parts) {
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

// What a caller can mend; laid out as mla_deploy.errors.MlaError.
class Error : public std::exception {
  public:
    // what: one sentence, what is wrong and where.
    Error(mla_text_status status, std::string what) : status_(status), text_(std::move(what)) {}

    template <class... Parts>
    Error&& found(const Parts&... parts) && {
        return std::move(*this).line("\n  found:   ", join(parts...));
    }
    template <class... Parts>
    Error&& allowed(const Parts&... parts) && {
        return std::move(*this).line("\n  allowed: ", join(parts...));
    }
    template <class... Parts>
    Error&& next(const Parts&... parts) && {
        return std::move(*this).line("\n  next:    ", join(parts...));
    }

    mla_text_status status() const { return status_; }
    const char* what() const noexcept override { return text_.c_str(); }

  private:
    Error&& line(const char* label, const std::string& text) && {
        text_ += label;
        text_ += text;
        return std::move(*this);
    }

    mla_text_status status_;
    std::string text_;
};

inline Error bad_tokenizer(std::string what) {
    return Error(MLA_TEXT_BAD_TOKENIZER, "tokenizer.json is not valid: " + std::move(what));
}

// Valid, but not ours.
inline Error unsupported(std::string what) {
    return Error(MLA_TEXT_UNSUPPORTED, "tokenizer.json is not supported: " + std::move(what))
        .next("encode and decode in Python, with the package tokenizers");
}

}  // namespace mla::text
