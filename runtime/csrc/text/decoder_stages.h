// The stages of a decoder that remember something from token to token.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "text/decoder.h"
#include "text/utf8.h"

namespace mla::text {

// The end of a chain.
class AppendText : public DecoderStage {
  public:
    explicit AppendText(std::string& text) : text_(text) {}
    void push(std::string_view token) override { text_ += token; }
    void finish() override {}

  private:
    std::string& text_;
};

class StageBefore : public DecoderStage {
  public:
    explicit StageBefore(TokenSink next) : next_(std::move(next)) {}
    void finish() override { next_->finish(); }

  protected:
    DecoderStage& next() { return *next_; }

  private:
    TokenSink next_;
};

// Each token by itself; `map` outlives the stage.
class MapTokens : public StageBefore {
  public:
    MapTokens(TokenSink next, const std::function<std::string(std::string_view)>& map)
        : StageBefore(std::move(next)), map_(map) {}
    void push(std::string_view token) override { next().push(map_(token)); }

  private:
    const std::function<std::string(std::string_view)>& map_;
};

class JoinWithSpaces : public StageBefore {
  public:
    using StageBefore::StageBefore;
    void push(std::string_view token) override {
        if (!first_) next().push(" ");
        first_ = false;
        next().push(token);
    }
    void finish() override {
        first_ = true;
        StageBefore::finish();
    }

  private:
    bool first_ = true;
};

// Bytes of any kind in, UTF-8 out.
class JoinBytes : public StageBefore {
  public:
    using StageBefore::StageBefore;
    void push(std::string_view token) override {
        out_.clear();
        utf8_.push(token, out_);
        next().push(out_);
    }
    void finish() override {
        out_.clear();
        utf8_.flush(out_);
        next().push(out_);
        StageBefore::finish();
    }

  private:
    LossyUtf8 utf8_;
    std::string out_;
};

// A run of tokens like <0xE2> becomes the text that the bytes are, as one token; or as many U+FFFD
// as it has bytes, if they are not UTF-8. Hence a run has to be held to its end.
class ByteFallback : public StageBefore {
  public:
    using StageBefore::StageBefore;
    void push(std::string_view token) override {
        const int byte = byte_of(token);
        if (byte >= 0) {
            run_.push_back(static_cast<char>(byte));
            return;
        }
        end_run();
        next().push(token);
    }
    void finish() override {
        end_run();
        StageBefore::finish();
    }

  private:
    void end_run() {
        if (run_.empty()) return;
        if (find_invalid_utf8(run_) == std::string_view::npos) {
            next().push(run_);
        } else {
            for (size_t i = 0; i < run_.size(); ++i) next().push("\xef\xbf\xbd");
        }
        run_.clear();
    }

    static int hex_digit(char c) {
        if (c >= '0' && c <= '9') return c - '0';
        if (c >= 'a' && c <= 'f') return c - 'a' + 10;
        if (c >= 'A' && c <= 'F') return c - 'A' + 10;
        return -1;
    }
    static int byte_of(std::string_view token) {
        if (token.size() != 6 || token.substr(0, 3) != "<0x" || token[5] != '>') return -1;
        const int high = token[3] == '+' ? 0 : hex_digit(token[3]);  // Rust reads "+5" as a number
        const int low = hex_digit(token[4]);
        return high < 0 || low < 0 ? -1 : high * 16 + low;
    }

    std::string run_;
};

// ---- behind Fuse: one token, in chunks ----------------------------------------------------------

// Up to `start` of the character off its begin, up to `stop` off its end.
class StripFused : public StageBefore {
  public:
    StripFused(TokenSink next, std::string character, size_t start, size_t stop)
        : StageBefore(std::move(next)),
          character_(std::move(character)),
          start_(start),
          stop_(stop),
          start_left_(start) {}

    // Chunks are whole characters, so comparing bytes is enough.
    void push(std::string_view chunk) override {
        while (start_left_ > 0 && !chunk.empty()) {
            if (chunk.substr(0, character_.size()) != character_) {
                start_left_ = 0;
                break;
            }
            chunk.remove_prefix(character_.size());
            --start_left_;
        }
        if (stop_ == 0) {
            if (!chunk.empty()) next().push(chunk);
            return;
        }
        // What may yet turn out to be the end is kept back.
        held_ += chunk;
        size_t keep = held_.size();
        size_t count = 0;
        while (count < stop_ && keep >= character_.size() &&
               held_.compare(keep - character_.size(), character_.size(), character_) == 0) {
            keep -= character_.size();
            ++count;
        }
        if (keep > 0) next().push(std::string_view(held_).substr(0, keep));
        held_.erase(0, keep);
    }
    void finish() override {
        held_.clear();
        start_left_ = start_;
        StageBefore::finish();
    }

  private:
    std::string character_;
    size_t start_, stop_, start_left_;
    std::string held_;
};

// Replaces each `pattern`, also where it comes in two chunks.
class ReplaceFused : public StageBefore {
  public:
    ReplaceFused(TokenSink next, std::string pattern, std::string content)
        : StageBefore(std::move(next)),
          pattern_(std::move(pattern)),
          content_(std::move(content)) {}

    void push(std::string_view chunk) override {
        held_ += chunk;
        std::string out;
        size_t at = 0;
        for (size_t found; (found = held_.find(pattern_, at)) != std::string::npos;) {
            out.append(held_, at, found - at);
            out += content_;
            at = found + pattern_.size();
        }
        // The longest end that may begin a match.
        size_t begin = std::max(at, held_.size() - std::min(held_.size(), pattern_.size() - 1));
        while (begin < held_.size() && pattern_.compare(0, held_.size() - begin, held_, begin) != 0)
            ++begin;
        out.append(held_, at, begin - at);
        held_.erase(0, begin);
        if (!out.empty()) next().push(out);
    }
    void finish() override {
        if (!held_.empty()) next().push(held_);
        held_.clear();
        StageBefore::finish();
    }

  private:
    std::string pattern_, content_, held_;
};

}  // namespace mla::text
