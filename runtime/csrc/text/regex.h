// A compiled regular expression (PCRE2, with its JIT where there is one), and finding all matches.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace mla::text {

// [begin, end) in bytes.
struct Span {
    size_t begin, end;
};

// What matching needs besides the expression. One thread uses it at a time.
class MatchMemory {
  public:
    MatchMemory();
    ~MatchMemory();
    MatchMemory(const MatchMemory&) = delete;
    MatchMemory& operator=(const MatchMemory&) = delete;

  private:
    friend class Regex;
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

class Regex {
  public:
    // In the syntax of tokenizers. where: its place in tokenizer.json.
    static Regex parse(std::string_view pattern, const std::string& where);
    // Matches `text` itself, which must not be empty.
    static Regex of_literal(std::string_view text, const std::string& where);

    // Appends the matches from left to right, none within another and no empty one right behind
    // another, as Oniguruma's find_iter gives them. `text` is valid UTF-8.
    // Throws MLA_TOO_COMPLEX where PCRE2's limits on steps or memory are reached.
    void find_all(std::string_view text, MatchMemory& memory, std::vector<Span>& matches) const;

  private:
    struct Code;
    explicit Regex(std::shared_ptr<const Code> code) : code_(std::move(code)) {}
    static Regex compile(const std::string& pcre2, const std::string& where);
    std::shared_ptr<const Code> code_;
};

}  // namespace mla::text
