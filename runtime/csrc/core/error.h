// Errors inside the core: a status, and a text that says what to do.
#pragma once

#include <exception>
#include <optional>
#include <sstream>
#include <string>
#include <utility>

#include "mla_deploy/runtime.h"

namespace mla::core {

// The arguments as one text: join("layer ", 3).
template <class... Parts>
std::string join(const Parts&... parts) {
    std::ostringstream stream;
    (stream << ... << parts);
    return stream.str();
}

// What a caller can mend, with the fields of mla_deploy.errors.MlaError, as which it reaches
// Python; C and C++ programs get them as one text, laid out alike:
//
//     throw Error(MLA_CACHE_FULL, "the cache is full").found(found).allowed(allowed).next(hint);
class Error : public std::exception {
  public:
    struct Fields {
        std::string what;  // one sentence, what is wrong and where
        std::optional<std::string> found, allowed, next;
    };

    Error(mla_status status, std::string what)
        : status_(status), fields_{std::move(what), {}, {}, {}}, text_(fields_.what) {}

    template <class... Parts>
    Error&& found(const Parts&... parts) && {
        return std::move(*this).line("\n  found:   ", fields_.found, join(parts...));
    }
    template <class... Parts>
    Error&& allowed(const Parts&... parts) && {
        return std::move(*this).line("\n  allowed: ", fields_.allowed, join(parts...));
    }
    template <class... Parts>
    Error&& next(const Parts&... parts) && {
        return std::move(*this).line("\n  next:    ", fields_.next, join(parts...));
    }

    mla_status status() const { return status_; }
    const Fields& fields() const { return fields_; }
    const char* what() const noexcept override { return text_.c_str(); }

  private:
    Error&& line(const char* label, std::optional<std::string>& field, std::string text) && {
        text_ += label;
        text_ += text;
        field = std::move(text);
        return std::move(*this);
    }

    mla_status status_;
    Fields fields_;
    std::string text_;
};

inline Error invalid(std::string what) { return Error(MLA_INVALID_ARGUMENT, std::move(what)); }

}  // namespace mla::core
