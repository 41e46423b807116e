#include "text/bpe.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "text/byte_level.h"
#include "text/error.h"
#include "text/utf8.h"

namespace mla::text {
namespace {

constexpr std::string_view kWordBegin = "\xe2\x96\x81";  // U+2581
constexpr size_t kShort = 48;  // symbols up to which looking at all pairs beats a queue

// Lower rank first, then further left: the end of the heap is what std::pop_heap takes.
bool later(const BpeMemory::Candidate& a, const BpeMemory::Candidate& b) {
    return a.rank != b.rank ? a.rank > b.rank : a.at > b.at;
}

}  // namespace

// ---- encoding ---------------------------------------------------------------------------------

uint32_t Bpe::unknown_id() const {
    if (unk_id_ == kNone) {
        throw bad_tokenizer(
            "the text has a character that is no token, and so is the unknown token")
            .found(unk_token_)
            .allowed("a token of the vocabulary as unk_token, or byte_fallback with all 256 bytes");
    }
    return unk_id_;
}

// One symbol for each character, or what stands for it where it is no token. An unknown token is
// held back until a known character comes, as tokenizers does, so bytes may overtake it.
void Bpe::initial_symbols(std::string_view word, std::vector<uint32_t>& out) const {
    bool unknown = false;
    const auto unknown_character = [&] {
        if (!has_unk_) return;
        if (unknown && !fuse_unk_) out.push_back(unk_id_);
        unknown_id();
        unknown = true;
    };
    const auto known = [&](uint32_t id) {
        if (unknown) out.push_back(unk_id_);
        unknown = false;
        out.push_back(id);
    };
    const auto fall_back = [&](std::string_view character) {
        const auto id_of = [&](char c) { return fallback_ids_[static_cast<unsigned char>(c)]; };
        const bool all = byte_fallback_ && std::all_of(character.begin(), character.end(),
                                                       [&](char c) { return id_of(c) != kNone; });
        if (!all) return unknown_character();
        for (const char c : character) out.push_back(id_of(c));
    };
    for (size_t at = 0; at < word.size();) {
        if (byte_level_) {
            const auto byte = static_cast<unsigned char>(word[at++]);
            if (byte_ids_[byte] != kNone) {
                known(byte_ids_[byte]);
            } else {
                std::string character;
                append_utf8(character, byte_to_char()[byte]);
                fall_back(character);
            }
            continue;
        }
        const size_t begin = at;
        const char32_t code = next_code_point(word, at);
        if (code < char_ids_.size() && char_ids_[code] != kNone) {
            known(char_ids_[code]);
        } else {
            fall_back(word.substr(begin, at - begin));
        }
    }
    if (unknown) out.push_back(unk_id_);
}

void Bpe::encode(std::string_view word, BpeMemory& memory, std::vector<uint32_t>& ids) const {
    if (!free_boundary_) return encode_part(word, memory, ids);
    for (size_t begin = 0; begin < word.size();) {
        // The next marker with something else before it.
        size_t end = begin;
        while (word.substr(end, kWordBegin.size()) == kWordBegin) end += kWordBegin.size();
        end = std::min(word.find(kWordBegin, end), word.size());
        encode_part(word.substr(begin, end - begin), memory, ids);
        begin = end;
    }
}

void Bpe::encode_part(std::string_view word, BpeMemory& memory, std::vector<uint32_t>& ids) const {
    const bool cached = word.size() <= WordCache::kMaxBytes;
    WordCache::Entry* entry = nullptr;
    if (cached) {
        entry = &memory.cache.slot(word);
        if (WordCache::holds(*entry, word)) {
            ids.insert(ids.end(), entry->ids.begin(), entry->ids.begin() + entry->count);
            return;
        }
    }
    std::vector<uint32_t>& out = memory.word;
    out.clear();
    if (ignore_merges_) {
        const auto whole = whole_words_.find(std::string(word));
        if (whole != whole_words_.end()) out.push_back(whole->second);
    }
    if (out.empty()) {
        initial_symbols(word, out);
        if (out.size() <= kShort) {
            merge_short(memory);
        } else {
            merge_long(memory);
        }
    }
    if (cached && out.size() <= WordCache::kMaxIds)
        WordCache::fill(*entry, word, out.data(), out.size());
    ids.insert(ids.end(), out.begin(), out.end());
}

void Bpe::merge_short(BpeMemory& memory) const {
    std::vector<uint32_t>& word = memory.word;
    if (word.size() < 2) return;
    std::vector<Merge>& merges = memory.merges;  // [i]: of word[i] and word[i + 1]
    merges.resize(word.size() - 1);
    for (size_t i = 0; i + 1 < word.size(); ++i) merges[i] = merges_.find(word[i], word[i + 1]);
    while (!merges.empty()) {
        size_t best = 0;
        for (size_t i = 1; i < merges.size(); ++i) {
            if (merges[i].rank < merges[best].rank) best = i;
        }
        if (merges[best].rank == kNoMerge) return;
        word[best] = merges[best].into;
        word.erase(word.begin() + static_cast<ptrdiff_t>(best) + 1);
        merges.erase(merges.begin() + static_cast<ptrdiff_t>(best));
        if (best > 0) merges[best - 1] = merges_.find(word[best - 1], word[best]);
        if (best < merges.size()) merges[best] = merges_.find(word[best], word[best + 1]);
    }
}

void Bpe::merge_long(BpeMemory& memory) const {
    std::vector<uint32_t>& word = memory.word;
    auto& symbols = memory.symbols;
    auto& queue = memory.queue;
    const auto count = static_cast<int32_t>(word.size());
    symbols.resize(word.size());
    for (int32_t i = 0; i < count; ++i) {
        symbols[i] = {word[i], i - 1, i + 1 < count ? i + 1 : -1};
    }
    const auto candidate = [&](int32_t at) {
        const int32_t next = symbols[at].next;
        if (next < 0) return false;
        const Merge merge = merges_.find(symbols[at].id, symbols[next].id);
        if (merge.rank == kNoMerge) return false;
        queue.push_back({merge.rank, at, symbols[at].id, symbols[next].id, merge.into});
        return true;
    };
    queue.clear();
    for (int32_t i = 0; i < count; ++i) candidate(i);
    std::make_heap(queue.begin(), queue.end(), later);
    while (!queue.empty()) {
        std::pop_heap(queue.begin(), queue.end(), later);
        const BpeMemory::Candidate top = queue.back();
        queue.pop_back();
        BpeMemory::Symbol& left = symbols[top.at];
        // Whether the pair is still what it was when it was queued; merged symbols have no id.
        if (left.id != top.left || left.next < 0 || symbols[left.next].id != top.right) continue;
        BpeMemory::Symbol& right = symbols[left.next];
        left.id = top.into;
        left.next = right.next;
        if (right.next >= 0) symbols[right.next].previous = top.at;
        right.id = kNone;
        if (candidate(top.at)) std::push_heap(queue.begin(), queue.end(), later);
        if (left.previous >= 0 && candidate(left.previous)) {
            std::push_heap(queue.begin(), queue.end(), later);
        }
    }
    word.clear();
    for (int32_t at = 0; at >= 0; at = symbols[at].next) word.push_back(symbols[at].id);
}

// ---- reading ----------------------------------------------------------------------------------

Bpe::Bpe(const Config& config, bool byte_level) : byte_level_(byte_level) {
    const auto type = config.find("type");
    if (type ? type->text() != "BPE" : !config.find("merges")) {
        throw unknown_component(config, "model", "BPE");
    }
    const auto dropout = config.find("dropout");
    if (dropout && !(dropout->json().is_number() && dropout->json().get<double>() == 0)) {
        throw unsupported(join("random tokens by ", dropout->path()))
            .found(dropout->excerpt())
            .allowed("null");
    }
    for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
        const auto affix = config.find(name);
        if (affix && !affix->text().empty()) {
            throw unsupported(affix->path()).found(affix->excerpt()).allowed("null");
        }
    }
    byte_fallback_ = config.boolean("byte_fallback", false);
    fuse_unk_ = config.boolean("fuse_unk", false);
    ignore_merges_ = config.boolean("ignore_merges", false);
    read_vocab(config.at("vocab"));
    if (const auto unk = config.find("unk_token")) {
        has_unk_ = true;
        unk_token_ = unk->text();
        const auto found = vocab_.find(unk_token_);
        if (found != vocab_.end()) unk_id_ = found->second;
    }
    read_initial_ids();
    read_merges(config.at("merges"));
}

void Bpe::read_vocab(const Config& config) {
    if (!config.json().is_object()) throw config.bad("an object of tokens and their ids");
    vocab_.reserve(config.json().size());
    std::vector<bool> used;
    for (const auto& [token, value] : config.json().items()) {
        if (!value.is_number_unsigned() || value.get<uint64_t>() >= kMaxIds) {
            // Says what is wrong; its path is not made for each good token.
            Config(value, join(config.path(), "[", Json(token).dump(), "]")).integer(kMaxIds);
        }
        const auto id = value.get<uint32_t>();
        if (id >= used.size()) used.resize(id + 1);
        if (used[id])
            throw bad_tokenizer(join("two tokens at ", config.path(), " have the id ", id))
                .found(token);
        used[id] = true;
        vocab_.emplace(token, id);
    }
}

void Bpe::read_initial_ids() {
    byte_ids_.fill(kNone);
    fallback_ids_.fill(kNone);
    for (const auto& [token, id] : vocab_) {
        if (token.empty()) continue;
        size_t at = 0;
        const char32_t code = next_code_point(token, at);
        if (at == token.size()) {
            if (code >= char_ids_.size()) char_ids_.resize(code + 1, kNone);
            char_ids_[code] = id;
            const int byte = char_to_byte(code);
            if (byte >= 0) byte_ids_[static_cast<size_t>(byte)] = id;
        }
        if (!ignore_merges_) continue;
        if (!byte_level_) {
            whole_words_.emplace(token, id);
            continue;
        }
        bool all;
        std::string bytes = spelled_bytes(token, &all);
        if (all) whole_words_.emplace(std::move(bytes), id);
    }
    for (int byte = 0; byte < 256; ++byte) {
        char name[8];
        std::snprintf(name, sizeof name, "<0x%02X>", byte);
        const auto found = vocab_.find(name);
        if (found != vocab_.end()) fallback_ids_[static_cast<size_t>(byte)] = found->second;
    }
}

void Bpe::read_merges(const Config& config) {
    const size_t count = config.size();
    merges_ = MergeTable(count);
    std::vector<std::array<std::string_view, 2>> pairs;
    uint32_t rank = 0;
    for (size_t i = 0; i < count; ++i) {
        const Json& entry = config.json()[i];
        std::string_view left, right;
        if (entry.is_string()) {  // "left right", in files from before 2024
            const std::string_view text = entry.get_ref<const std::string&>();
            if (text.substr(0, 8) == "#version") continue;
            const size_t space = text.find(' ');
            if (space == std::string_view::npos ||
                text.find(' ', space + 1) != std::string_view::npos) {
                throw config[i].bad("two tokens and one space");
            }
            left = text.substr(0, space);
            right = text.substr(space + 1);
        } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() &&
                   entry[1].is_string()) {
            left = entry[0].get_ref<const std::string&>();
            right = entry[1].get_ref<const std::string&>();
        } else {
            throw config[i].bad("[\"left\", \"right\"] or \"left right\"");
        }
        const auto id_of = [&](const std::string& token) {
            const auto found = vocab_.find(token);
            if (found == vocab_.end()) {
                throw bad_tokenizer(join("a merge at ", config.path(), "[", i, "] is of no token"))
                    .found(Json(token).dump())
                    .allowed("tokens of model.vocab");
            }
            return found->second;
        };
        const std::string left_text(left), right_text(right);
        const uint32_t into = id_of(left_text + right_text);
        merges_.set(id_of(left_text), id_of(right_text), {rank++, into});
        pairs.push_back({left, right});
    }
    find_free_boundary(pairs);
}

void Bpe::find_free_boundary(const std::vector<std::array<std::string_view, 2>>& merges) {
    const auto marker = vocab_.find(std::string(kWordBegin));
    if (byte_level_ || ignore_merges_ || marker == vocab_.end()) return;
    // Symbols that do not spell what they stand for must not merge at all.
    const auto stands_for_other = [&](std::string_view token) {
        const auto found = vocab_.find(std::string(token));
        return token.empty() || found->second == unk_id_ ||
               (byte_fallback_ && std::find(fallback_ids_.begin(), fallback_ids_.end(),
                                            found->second) != fallback_ids_.end());
    };
    for (const auto& [left, right] : merges) {
        if (stands_for_other(left) || stands_for_other(right)) return;
        const bool right_begins = right.substr(0, kWordBegin.size()) == kWordBegin;
        const bool left_ends = left.size() >= kWordBegin.size() &&
                               left.substr(left.size() - kWordBegin.size()) == kWordBegin;
        if (right_begins && !left_ends) return;
    }
    free_boundary_ = true;
}

}  // namespace mla::text
