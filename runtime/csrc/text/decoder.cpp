#include "text/decoder.h"

#include <algorithm>

#include "text/byte_level.h"
#include "text/decoder_stages.h"
#include "text/metaspace.h"
#include "text/normalizer.h"

namespace mla::text {
namespace {

constexpr uint32_t kMaxStrip = 1u << 16;

std::string replaced(std::string_view text, const std::string& from, const std::string& to) {
    std::string out;
    size_t at = 0;
    for (size_t found; (found = text.find(from, at)) != std::string_view::npos;
         at = found + from.size()) {
        out += text.substr(at, found - at);
        out += to;
    }
    return out += text.substr(at);
}

std::string stripped(std::string_view text, const std::string& character, size_t start,
                     size_t stop) {
    const size_t size = character.size();
    for (; start > 0 && text.substr(0, size) == character; --start) text.remove_prefix(size);
    for (; stop > 0 && text.size() >= size && text.substr(text.size() - size) == character;
         --stop) {
        text.remove_suffix(size);
    }
    return std::string(text);
}

// Metaspace: the first token loses its markers, in the others they become spaces.
class UnmarkSpaces : public StageBefore {
  public:
    UnmarkSpaces(TokenSink next, std::string marker, bool drop_first, bool fused)
        : StageBefore(std::move(next)),
          marker_(std::move(marker)),
          drop_first_(drop_first),
          fused_(fused) {}
    void push(std::string_view token) override {
        next().push(replaced(token, marker_, first_ && drop_first_ ? "" : " "));
        if (!fused_) first_ = false;
    }
    void finish() override {
        first_ = true;
        StageBefore::finish();
    }

  private:
    std::string marker_;
    bool drop_first_, fused_, first_ = true;
};

Error after_fuse(const Config& config) {
    return unsupported(join("the decoder at ", config.path(), ", behind one that joins tokens"))
        .found(config.at("type").excerpt())
        .allowed("Fuse, Strip, Metaspace, and Replace of a String there");
}

}  // namespace

DecoderPlan::DecoderPlan(const std::optional<Config>& config) {
    if (config) {
        add(*config, 0);
    } else {
        add_stage([](TokenSink next) { return std::make_unique<JoinWithSpaces>(std::move(next)); });
    }
}

std::string DecoderPlan::prepare(std::string_view token) const {
    std::string text(token);
    for (const auto& map : maps_) text = map(text);
    return text;
}

TokenSink DecoderPlan::chain(std::string& text) const {
    TokenSink sink = std::make_unique<AppendText>(text);
    for (size_t i = stages_.size(); i-- > 0;) sink = stages_[i](std::move(sink));
    return sink;
}

void DecoderPlan::add_stage(MakeStage make) { stages_.push_back(std::move(make)); }

// A function of one token is applied ahead of time where nothing stands before it.
void DecoderPlan::add_map(TokenMap map) {
    if (stages_.empty()) {
        maps_.push_back(std::move(map));
    } else {
        add_stage([map = std::make_shared<const TokenMap>(std::move(map))](TokenSink next) {
            return std::make_unique<MapTokens>(std::move(next), *map);
        });
    }
}

void DecoderPlan::add(const Config& config, int depth) {
    const std::string& type = config.at("type").text();
    if (type == "Sequence") {
        if (depth == kMaxDepth)
            throw unsupported(join("more than ", kMaxDepth, " nested decoders"));
        const Config parts = config.at("decoders");
        for (size_t i = 0; i < parts.size(); ++i) add(parts[i], depth + 1);
    } else if (type == "ByteLevel") {
        if (fused_) throw after_fuse(config);
        add_map([](std::string_view token) { return spelled_bytes(token); });
        add_stage([](TokenSink next) { return std::make_unique<JoinBytes>(std::move(next)); });
        fused_ = true;
    } else if (type == "ByteFallback") {
        if (fused_) throw after_fuse(config);
        add_stage([](TokenSink next) { return std::make_unique<ByteFallback>(std::move(next)); });
    } else if (type == "Fuse") {
        fused_ = true;  // tokens that follow are chunks of one
    } else if (type == "Replace") {
        add_replace(config);
    } else if (type == "Strip") {
        add_strip(config);
    } else if (type == "Metaspace") {
        add_metaspace(config);
    } else {
        throw unknown_component(
            config, "decoder",
            "Sequence, ByteLevel, Replace, ByteFallback, Fuse, Strip, Metaspace");
    }
}

void DecoderPlan::add_replace(const Config& config) {
    const std::string content = config.at("content").text();
    const Config pattern = config.at("pattern");
    if (!fused_) {
        const Regex regex = read_pattern(pattern);
        return add_map([regex, content](std::string_view token) {
            thread_local MatchMemory memory;
            std::string text(token);
            replace_all(text, regex, content, memory);
            return text;
        });
    }
    const auto text = pattern.find("String");
    if (!text) throw after_fuse(config);
    if (text->text().empty()) throw text->bad("a string that is not empty");
    add_stage([from = text->text(), content](TokenSink next) {
        return std::make_unique<ReplaceFused>(std::move(next), from, content);
    });
}

void DecoderPlan::add_strip(const Config& config) {
    const std::string character = read_character(config.at("content"));
    const size_t start = config.at("start").integer(kMaxStrip);
    const size_t stop = config.at("stop").integer(kMaxStrip);
    if (!fused_) {
        return add_map(
            [=](std::string_view token) { return stripped(token, character, start, stop); });
    }
    add_stage([=](TokenSink next) {
        return std::make_unique<StripFused>(std::move(next), character, start, stop);
    });
}

void DecoderPlan::add_metaspace(const Config& config) {
    const std::string marker = read_character(config.at("replacement"));
    const bool drop = read_prepend_scheme(config) != PrependScheme::kNever;
    add_stage([=, fused = fused_](TokenSink next) {
        return std::make_unique<UnmarkSpaces>(std::move(next), marker, drop, fused);
    });
}

}  // namespace mla::text
