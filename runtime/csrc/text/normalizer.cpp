#include "text/normalizer.h"

#include <vector>

#include "text/nfc.h"

namespace mla::text {
namespace {

class Prepend : public Normalizer {
  public:
    explicit Prepend(std::string text) : prefix_(std::move(text)) {}
    void apply(std::string& text, MatchMemory&) const override {
        if (!text.empty()) text.insert(0, prefix_);
    }

  private:
    std::string prefix_;
};

class Replace : public Normalizer {
  public:
    Replace(Regex pattern, std::string content)
        : pattern_(std::move(pattern)), content_(std::move(content)) {}
    void apply(std::string& text, MatchMemory& memory) const override {
        replace_all(text, pattern_, content_, memory);
    }

  private:
    Regex pattern_;
    std::string content_;
};

class Nfc : public Normalizer {
  public:
    void apply(std::string& text, MatchMemory&) const override { text = to_nfc(text); }
};

class Sequence : public Normalizer {
  public:
    explicit Sequence(std::vector<std::unique_ptr<const Normalizer>> parts)
        : parts_(std::move(parts)) {}
    void apply(std::string& text, MatchMemory& memory) const override {
        for (const auto& part : parts_) part->apply(text, memory);
    }

  private:
    std::vector<std::unique_ptr<const Normalizer>> parts_;
};

}  // namespace

Regex read_pattern(const Config& config) {
    if (const auto text = config.find("String")) {
        if (text->text().empty()) throw text->bad("a string that is not empty");
        return Regex::of_literal(text->text(), text->path());
    }
    if (const auto regex = config.find("Regex")) return Regex::parse(regex->text(), regex->path());
    throw config.bad(R"({"String": "..."} or {"Regex": "..."})");
}

void replace_all(std::string& text, const Regex& pattern, const std::string& content,
                 MatchMemory& memory) {
    std::vector<Span> matches;
    pattern.find_all(text, memory, matches);
    if (matches.empty()) return;
    std::string out;
    size_t at = 0;
    for (const Span& match : matches) {
        out.append(text, at, match.begin - at);
        out += content;
        at = match.end;
    }
    out.append(text, at);
    text = std::move(out);
}

std::unique_ptr<const Normalizer> read_normalizer(const Config& config, int depth) {
    const std::string& type = config.at("type").text();
    if (type == "Sequence") {
        if (depth == kMaxDepth)
            throw unsupported(join("more than ", kMaxDepth, " nested normalizers"));
        const Config parts = config.at("normalizers");
        std::vector<std::unique_ptr<const Normalizer>> read;
        for (size_t i = 0; i < parts.size(); ++i)
            read.push_back(read_normalizer(parts[i], depth + 1));
        return std::make_unique<Sequence>(std::move(read));
    }
    if (type == "Prepend") return std::make_unique<Prepend>(config.at("prepend").text());
    if (type == "Replace") {
        return std::make_unique<Replace>(read_pattern(config.at("pattern")),
                                         config.at("content").text());
    }
    if (type == "NFC") return std::make_unique<Nfc>();
    throw unknown_component(config, "normalizer", "Sequence, Prepend, Replace, NFC");
}

}  // namespace mla::text
