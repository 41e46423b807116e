// Byte pair encoding: the field "model".
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "text/config.h"
#include "text/merge_table.h"
#include "text/word_cache.h"

namespace mla::text {

// What encoding works with; one thread uses it at a time.
struct BpeMemory {
    struct Symbol {
        uint32_t id;
        int32_t previous, next;
    };
    struct Candidate {
        uint32_t rank;
        int32_t at;
        uint32_t left, right, into;
    };
    WordCache cache;
    std::vector<uint32_t> word;
    std::vector<Merge> merges;
    std::vector<Symbol> symbols;
    std::vector<Candidate> queue;
};

class Bpe {
  public:
    // byte_level: words come as bytes, which the vocabulary spells in the alphabet of byte_level.h.
    Bpe(const Config& config, bool byte_level);

    // Appends the ids of one word of valid UTF-8, not empty.
    void encode(std::string_view word, BpeMemory& memory, std::vector<uint32_t>& ids) const;

    const std::unordered_map<std::string, uint32_t>& vocab() const { return vocab_; }

  private:
    void read_vocab(const Config& config);
    void read_merges(const Config& config);
    void find_free_boundary(const std::vector<std::array<std::string_view, 2>>& merges);
    void read_initial_ids();

    void encode_part(std::string_view word, BpeMemory& memory, std::vector<uint32_t>& ids) const;
    void initial_symbols(std::string_view word, std::vector<uint32_t>& out) const;
    void merge_short(BpeMemory& memory) const;
    void merge_long(BpeMemory& memory) const;
    uint32_t unknown_id() const;

    static constexpr uint32_t kNone = UINT32_MAX;

    std::unordered_map<std::string, uint32_t> vocab_;
    MergeTable merges_;
    bool byte_level_ = false, byte_fallback_ = false, fuse_unk_ = false, ignore_merges_ = false;
    bool has_unk_ = false;
    std::string unk_token_;
    uint32_t unk_id_ = kNone;  // kNone: not in the vocabulary

    std::array<uint32_t, 256> byte_ids_{};                   // of the characters that spell bytes
    std::vector<uint32_t> char_ids_;                         // by code point, up to the largest
    std::array<uint32_t, 256> fallback_ids_{};               // of <0x00> to <0xFF>
    std::unordered_map<std::string, uint32_t> whole_words_;  // for ignore_merges, as words come

    // Whether no merge reaches over the begin of a word marked by U+2581, so that text which was
    // not split before can be split there.
    bool free_boundary_ = false;
};

}  // namespace mla::text
