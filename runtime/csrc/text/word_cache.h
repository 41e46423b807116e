// Ids of words seen lately. Words repeat, so most need no merging at all.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace mla::text {

class WordCache {
  public:
    static constexpr size_t kMaxBytes = 22;
    static constexpr size_t kMaxIds = 10;

    struct Entry {  // one cache line
        uint8_t size = 0, count = 0;
        std::array<char, kMaxBytes> word;
        std::array<uint32_t, kMaxIds> ids;
    };

    WordCache() : entries_(kEntries) {}

    // The slot where the word is or goes; word.size() in 1..kMaxBytes.
    Entry& slot(std::string_view word) { return entries_[hash(word) & (kEntries - 1)]; }

    static bool holds(const Entry& entry, std::string_view word) {
        return entry.size == word.size() &&
               std::memcmp(entry.word.data(), word.data(), word.size()) == 0;
    }

    static void fill(Entry& entry, std::string_view word, const uint32_t* ids, size_t count) {
        entry.size = static_cast<uint8_t>(word.size());
        entry.count = static_cast<uint8_t>(count);
        std::memcpy(entry.word.data(), word.data(), word.size());
        std::copy(ids, ids + count, entry.ids.begin());  // none for characters without token
    }

  private:
    static constexpr size_t kEntries = size_t{1} << 14;

    static uint64_t hash(std::string_view word) {
        uint64_t state = word.size();
        for (size_t at = 0; at < word.size(); at += 8) {
            uint64_t eight = 0;
            std::memcpy(&eight, word.data() + at, word.size() - at < 8 ? word.size() - at : 8);
            state = (state ^ eight) * 0x9e3779b97f4a7c15u;
            state ^= state >> 29;
        }
        return state;
    }

    std::vector<Entry> entries_;
};
static_assert(sizeof(WordCache::Entry) == 64, "an entry is one cache line");

}  // namespace mla::text
