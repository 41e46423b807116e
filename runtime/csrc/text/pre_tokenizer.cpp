#include "text/pre_tokenizer.h"

#include <optional>
#include <utility>

#include "text/metaspace.h"
#include "text/normalizer.h"
#include "text/split_behavior.h"

namespace mla::text {
namespace {

// GPT-2's words: English contractions, letters, numbers and other characters, each with the space
// before it, and white space.
constexpr char kGpt2[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

// tokenizers asks Rust here and not Oniguruma, and Rust knows Unicode 17.
constexpr char kNumeric[] = R"([\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}])";

class SplitByPattern : public SplitStep {
  public:
    SplitByPattern(Regex pattern, SplitBehavior behavior, bool inverted)
        : pattern_(std::move(pattern)), behavior_(behavior), inverted_(inverted) {}

    void apply(const Piece& piece, SplitMemory& memory, std::vector<Piece>& out) const override {
        std::vector<Span>& spans = memory.spans;
        spans.clear();
        pattern_.find_all(piece.text, memory.match, spans);
        split(spans, piece.text.size(), behavior_, inverted_);
        for (const Span& span : spans) {
            out.push_back({piece.text.substr(span.begin, span.end - span.begin),
                           piece.at_start && span.begin == 0});
        }
    }

  private:
    Regex pattern_;
    SplitBehavior behavior_;
    bool inverted_;
};

class AddPrefixSpace : public SplitStep {
  public:
    void apply(const Piece& piece, SplitMemory& memory, std::vector<Piece>& out) const override {
        if (piece.text[0] == ' ') {
            out.push_back(piece);
        } else {
            memory.changed.push_back(' ' + std::string(piece.text));
            out.push_back({memory.changed.back(), piece.at_start});
        }
    }
};

// Spaces become a visible character, and one is put before the text if it has none.
class Metaspace : public SplitStep {
  public:
    Metaspace(std::string replacement, PrependScheme prepend)
        : replacement_(std::move(replacement)), prepend_(prepend) {}

    void apply(const Piece& piece, SplitMemory& memory, std::vector<Piece>& out) const override {
        std::string text;
        for (const char c : piece.text) {
            if (c == ' ') {
                text += replacement_;
            } else {
                text += c;
            }
        }
        const bool wanted = prepend_ == PrependScheme::kAlways ||
                            (prepend_ == PrependScheme::kFirst && piece.at_start);
        if (wanted && text.compare(0, replacement_.size(), replacement_) != 0)
            text.insert(0, replacement_);
        memory.changed.push_back(std::move(text));
        out.push_back({memory.changed.back(), piece.at_start});
    }

  private:
    std::string replacement_;
    PrependScheme prepend_;
};

class Reader {
  public:
    PreTokenizer read(const Config& config) {
        component(config, 0);
        return std::move(result_);
    }

  private:
    void component(const Config& config, int depth) {
        const std::string& type = config.at("type").text();
        if (type == "Sequence") {
            if (depth == kMaxDepth) {
                throw unsupported(join("more than ", kMaxDepth, " nested pre-tokenizers"));
            }
            const Config parts = config.at("pretokenizers");
            for (size_t i = 0; i < parts.size(); ++i) component(parts[i], depth + 1);
            return;
        }
        if (result_.byte_level) {
            throw unsupported(join("a pre-tokenizer after ByteLevel, at ", config.path()))
                .found(type)
                .allowed("ByteLevel last");
        }
        if (type == "Split") {
            add_split(read_pattern(config.at("pattern")),
                      read_split_behavior(config.at("behavior")), config.boolean("invert", false));
        } else if (type == "ByteLevel") {
            if (config.boolean("add_prefix_space", true)) add(std::make_unique<AddPrefixSpace>());
            if (config.boolean("use_regex", true)) {
                add_split(Regex::parse(kGpt2, config.path()), SplitBehavior::kIsolated, false);
            }
            result_.byte_level = true;
        } else if (type == "Digits") {
            const bool individual = config.boolean("individual_digits", false);
            add_split(Regex::parse(kNumeric, config.path()),
                      individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous, false);
        } else if (type == "Metaspace") {
            metaspace(config);
        } else {
            throw unknown_component(config, "pre-tokenizer",
                                    "Sequence, Split, ByteLevel, Digits, Metaspace");
        }
    }

    void metaspace(const Config& config) {
        const std::string& text = read_character(config.at("replacement"));
        add(std::make_unique<Metaspace>(text, read_prepend_scheme(config)));
        if (config.boolean("split", true)) {
            add_split(Regex::of_literal(text, config.path()), SplitBehavior::kMergedWithNext,
                      false);
        }
    }

    void add(std::unique_ptr<const SplitStep> step) { result_.steps.push_back(std::move(step)); }
    void add_split(Regex pattern, SplitBehavior behavior, bool inverted) {
        add(std::make_unique<SplitByPattern>(std::move(pattern), behavior, inverted));
    }

    PreTokenizer result_;
};

}  // namespace

void PreTokenizer::run(SplitMemory& memory) const {
    for (const auto& step : steps) {
        memory.next.clear();
        for (const Piece& piece : memory.pieces) step->apply(piece, memory, memory.next);
        memory.pieces.swap(memory.next);
    }
}

PreTokenizer read_pre_tokenizer(const Config& config) { return Reader().read(config); }

}  // namespace mla::text
