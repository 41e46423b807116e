// From tokens back to text: the field "decoder", as a chain of stages that works as tokens come.
//
//     token -> Replace -> ByteFallback -> Fuse -> Strip -> text
//
// Before Fuse (or ByteLevel, which joins too) a stage sees token after token; behind it there is
// one long token that comes in chunks. A chain is one decoding; DecoderPlan makes chains.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/config.h"

namespace mla::text {

class DecoderStage {
  public:
    virtual ~DecoderStage() = default;
    // A token, or a chunk of the one token. Appends to the text if this is the last stage.
    virtual void push(std::string_view token) = 0;
    virtual void finish() = 0;  // no more tokens: pass on what is left, and be as new
};

// Passes tokens on.
using TokenSink = std::unique_ptr<DecoderStage>;

class DecoderPlan {
  public:
    // Without a config, tokens are joined by spaces.
    explicit DecoderPlan(const std::optional<Config>& config);

    // What the stages that look at one token alone make of it. Done once for each token.
    std::string prepare(std::string_view token) const;

    // The other stages, which write to `text`. The plan must outlive them.
    TokenSink chain(std::string& text) const;

  private:
    using MakeStage = std::function<TokenSink(TokenSink)>;
    void add(const Config& config, int depth);
    void add_stage(MakeStage make);
    void add_replace(const Config& config);
    void add_strip(const Config& config);
    void add_metaspace(const Config& config);
    using TokenMap = std::function<std::string(std::string_view)>;
    void add_map(TokenMap map);

    std::vector<TokenMap> maps_;
    std::vector<MakeStage> stages_;
    bool fused_ = false;
};

}  // namespace mla::text
