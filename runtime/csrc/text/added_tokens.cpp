#include "text/added_tokens.h"

#include <algorithm>

#include "text/characters.h"
#include "text/utf8.h"

namespace mla::text {
namespace {

unsigned char byte_at(std::string_view text, size_t at) {
    return static_cast<unsigned char>(text[at]);
}

// Begin of the last character of text[0, end).
size_t previous(std::string_view text, size_t end) {
    do --end;
    while ((byte_at(text, end) & 0xc0) == 0x80);
    return end;
}

bool word_before(std::string_view text, size_t at) {
    if (at == 0) return false;
    size_t begin = previous(text, at);
    return is_word(next_code_point(text, begin));
}

bool word_after(std::string_view text, size_t at) {
    return at < text.size() && is_word(next_code_point(text, at));
}

size_t space_before(std::string_view text, size_t at, size_t least) {
    while (at > least) {
        const size_t begin = previous(text, at);
        size_t i = begin;
        if (!is_space(next_code_point(text, i))) break;
        at = begin;
    }
    return at;
}

size_t space_after(std::string_view text, size_t at) {
    while (at < text.size()) {
        size_t end = at;
        if (!is_space(next_code_point(text, end))) break;
        at = end;
    }
    return at;
}

}  // namespace

void AddedTokenFinder::add(const AddedToken& token) {
    const std::string& content = token.content;
    if (content.empty()) return;
    uint32_t node = 0;
    for (const char c : content) {
        const auto found = trie_[node].next.find(static_cast<unsigned char>(c));
        if (found != trie_[node].next.end()) {
            node = found->second;
        } else {
            const auto fresh = static_cast<uint32_t>(trie_.size());
            trie_[node].next.emplace(static_cast<unsigned char>(c), fresh);
            trie_.emplace_back();
            node = fresh;
        }
    }
    if (trie_[node].token >= 0) return;  // two become equal in the normalizer: the first one wins
    trie_[node].token = static_cast<int32_t>(tokens_.size());
    tokens_.push_back(token);
    const size_t first = byte_at(content, 0);
    first_.set(first);
    for (size_t second = 0; second < 256; ++second) {
        if (content.size() == 1 || second == byte_at(content, 1))
            first_two_.set(first * 256 + second);
    }
}

int32_t AddedTokenFinder::longest_at(std::string_view text, size_t at, size_t& end) const {
    int32_t token = -1;
    uint32_t node = 0;
    for (size_t i = at; i < text.size();) {
        const auto found = trie_[node].next.find(byte_at(text, i));
        if (found == trie_[node].next.end()) break;
        node = found->second;
        ++i;
        if (trie_[node].token >= 0) {
            token = trie_[node].token;
            end = i;
        }
    }
    return token;
}

void AddedTokenFinder::split(std::string_view text, std::vector<Segment>& segments) const {
    size_t done = 0;
    for (size_t at = 0; at < text.size() && !tokens_.empty();) {
        const size_t first = byte_at(text, at);
        if (!first_[first] ||
            (at + 1 < text.size() && !first_two_[first * 256 + byte_at(text, at + 1)])) {
            ++at;
            continue;
        }
        size_t end = at;
        const int32_t found = longest_at(text, at, end);
        if (found < 0) {
            ++at;
            continue;
        }
        const AddedToken& token = tokens_[static_cast<size_t>(found)];
        size_t begin = at;
        at = end;
        if (token.single_word && (word_before(text, begin) || word_after(text, end))) continue;
        if (token.lstrip) begin = space_before(text, begin, std::min(done, begin));
        if (token.rstrip) end = space_after(text, end);
        if (done < begin) segments.push_back({text.substr(done, begin - done), -1});
        segments.push_back({text.substr(begin, end - begin), token.id});
        done = end;
    }
    if (done < text.size()) segments.push_back({text.substr(done), -1});
}

}  // namespace mla::text
