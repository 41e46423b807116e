// A tokenizer.json: text to ids, and back.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/added_tokens.h"
#include "text/bpe.h"
#include "text/decoder.h"
#include "text/normalizer.h"
#include "text/pieces.h"
#include "text/post_processor.h"
#include "text/pre_tokenizer.h"

namespace mla::text {

// Does not change once it is made; any number of threads may use it.
class Tokenizer {
  public:
    static std::shared_ptr<const Tokenizer> parse(std::string_view json);

    std::vector<uint32_t> encode(std::string_view text, bool add_special_tokens) const;

    // Passes the token to a chain of decoder(); ids of no token have no text.
    void decode(uint32_t id, bool skip_special_tokens, DecoderStage& chain) const;
    const DecoderPlan& decoder() const { return decoder_; }

    std::optional<uint32_t> token_id(std::string_view content) const;
    uint32_t vocab_size() const { return static_cast<uint32_t>(tokens_.size()); }

  private:
    struct Memory {
        SplitMemory split;
        BpeMemory bpe;
        std::vector<Segment> raw, normalized;
        std::string text;
    };
    // Lent to one call of encode.
    class Loan;

    struct Token {
        size_t begin = 0, size = 0;  // in spelled_, as decoder().prepare() has it
        bool exists = false, special = false;
    };

    explicit Tokenizer(const Config& config);
    void read_added_tokens(const Config& config);
    void add_to_finders(std::vector<AddedToken>& tokens);
    void spell_tokens(const std::vector<AddedToken>& added);
    void encode_segment(const Segment& segment, bool at_start, Memory& memory,
                        std::vector<uint32_t>& ids) const;
    void encode_text(std::string_view text, bool at_start, Memory& memory,
                     std::vector<uint32_t>& ids) const;

    std::unique_ptr<const Normalizer> normalizer_;  // null: none
    PreTokenizer pre_tokenizer_;
    std::unique_ptr<const Bpe> bpe_;
    PostProcessor post_processor_;
    DecoderPlan decoder_;
    std::unordered_map<std::string, uint32_t> added_ids_;
    AddedTokenFinder raw_tokens_, normalized_tokens_;
    std::vector<Token> tokens_;  // by id
    std::string spelled_;

    mutable std::mutex mutex_;
    mutable std::vector<std::unique_ptr<Memory>> idle_;
};

}  // namespace mla::text
