// Tokens that are found in the text as they stand, before anything else: the field "added_tokens".
#pragma once

#include <bitset>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace mla::text {

struct AddedToken {
    uint32_t id;
    std::string content;
    bool single_word = false;  // only where no word goes on at either side
    bool lstrip = false;       // takes white space before it along
    bool rstrip = false;       // and after it
    bool normalized = false;   // searched for after the normalizer, before it otherwise
    bool special = false;      // left out by decode, if asked
};

// A part of the text: an added token's, or ordinary text between them.
struct Segment {
    std::string_view text;
    int64_t id;  // -1: ordinary text
};

// Finds, from left to right, the longest token at each place.
class AddedTokenFinder {
  public:
    void add(const AddedToken& token);
    // Appends the segments of `text`.
    void split(std::string_view text, std::vector<Segment>& segments) const;

  private:
    struct Node {
        std::map<unsigned char, uint32_t> next;
        int32_t token = -1;
    };
    // The token that begins at text[at], and where it ends; -1: none.
    int32_t longest_at(std::string_view text, size_t at, size_t& end) const;

    std::vector<AddedToken> tokens_;
    std::vector<Node> trie_ = std::vector<Node>(1);
    std::bitset<256> first_;        // bytes that begin a token
    std::bitset<65536> first_two_;  // and pairs of them; tokens of one byte have all pairs
};

}  // namespace mla::text
