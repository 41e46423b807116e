// Decoding ids as they come.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "text/tokenizer.h"

namespace mla::text {

class Stream {
  public:
    Stream(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens)
        : tokenizer_(std::move(tokenizer)),
          skip_(skip_special_tokens),
          chain_(tokenizer_->decoder().chain(text_)) {}
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

    // What came to be complete; valid until the next call.
    const std::string& push(uint32_t id) {
        text_.clear();
        tokenizer_->decode(id, skip_, *chain_);
        return text_;
    }
    // The rest; the stream is then as new.
    const std::string& flush() {
        text_.clear();
        chain_->finish();
        return text_;
    }

  private:
    std::shared_ptr<const Tokenizer> tokenizer_;
    bool skip_;
    std::string text_;
    TokenSink chain_;  // writes to text_
};

}  // namespace mla::text
