#include "text/tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "text/utf8.h"

namespace mla::text {
namespace {

constexpr size_t kMaxText = size_t{1} << 31;
constexpr size_t kMaxAddedToken = 4096;  // bytes: each place in a text may be compared with it

Json parse_json(std::string_view text) {
    try {
        return Json::parse(text.begin(), text.end());
    } catch (const Json::exception& error) {
        throw bad_tokenizer("it is not JSON")
            .found(error.what())
            .next("take it from the model again");
    }
}

// Fields that change what encode gives, and that no model for generation sets.
void refuse_batch_fields(const Config& config) {
    if (const auto truncation = config.find("truncation")) {
        throw unsupported("it cuts texts")
            .found(truncation->excerpt())
            .allowed("\"truncation\": null");
    }
    const auto padding = config.find("padding");
    if (padding &&
        (padding->at("strategy").json() != "BatchLongest" || padding->find("pad_to_multiple_of"))) {
        throw unsupported("it pads texts").found(padding->excerpt()).allowed("\"padding\": null");
    }
}

}  // namespace

class Tokenizer::Loan {
  public:
    explicit Loan(const Tokenizer& owner) : owner_(owner) {
        std::lock_guard<std::mutex> lock(owner.mutex_);
        if (!owner.idle_.empty()) {
            memory_ = std::move(owner.idle_.back());
            owner.idle_.pop_back();
        }
        owner.idle_.reserve(owner.idle_.size() + 1);
        if (!memory_) memory_ = std::make_unique<Memory>();
    }
    ~Loan() {
        memory_->split.changed.clear();
        std::lock_guard<std::mutex> lock(owner_.mutex_);
        try {
            owner_.idle_.push_back(std::move(memory_));
        } catch (const std::bad_alloc&) {
        }  // it is made again
    }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    Memory& operator*() { return *memory_; }

  private:
    const Tokenizer& owner_;
    std::unique_ptr<Memory> memory_;
};

// ---- reading ----------------------------------------------------------------------------------

std::shared_ptr<const Tokenizer> Tokenizer::parse(std::string_view json) {
    const Json parsed = parse_json(json);
    return std::shared_ptr<const Tokenizer>(new Tokenizer(Config(parsed, "")));
}

Tokenizer::Tokenizer(const Config& config) : decoder_(config.find("decoder")) {
    refuse_batch_fields(config);
    if (const auto normalizer = config.find("normalizer"))
        normalizer_ = read_normalizer(*normalizer);
    if (const auto splitter = config.find("pre_tokenizer"))
        pre_tokenizer_ = read_pre_tokenizer(*splitter);
    bpe_ = std::make_unique<Bpe>(config.at("model"), pre_tokenizer_.byte_level);
    if (const auto processor = config.find("post_processor")) {
        post_processor_ = read_post_processor(*processor);
    }
    if (const auto added = config.find("added_tokens")) {
        read_added_tokens(*added);
    } else {
        spell_tokens({});
    }
}

// tokenizers gives a new token the id of the vocabulary, else the next free one behind it, and only
// warns where the file says otherwise. A model was trained with the one or the other: we refuse.
void Tokenizer::read_added_tokens(const Config& config) {
    std::vector<AddedToken> tokens;
    const auto& vocab = bpe_->vocab();
    const auto vocab_size = static_cast<uint32_t>(vocab.size());
    uint32_t largest = 0;
    for (size_t i = 0; i < config.size(); ++i) {
        const Config entry = config[i];
        AddedToken token;
        token.content = entry.at("content").text();
        token.single_word = entry.boolean("single_word", false);
        token.lstrip = entry.boolean("lstrip", false);
        token.rstrip = entry.boolean("rstrip", false);
        token.special = entry.boolean("special", false);
        token.normalized = entry.boolean("normalized", !token.special);
        if (token.content.empty()) continue;
        if (token.content.size() > kMaxAddedToken) {
            throw unsupported(join("the token at ", entry.path(), " is long"))
                .found(token.content.size(), " bytes")
                .allowed("at most ", kMaxAddedToken);
        }
        const auto known = vocab.find(token.content);
        token.id = known != vocab.end() ? known->second
                                        : std::max(largest + (tokens.empty() ? 0 : 1), vocab_size);
        const uint32_t written = entry.at("id").integer(kMaxIds);
        if (written != token.id) {
            throw bad_tokenizer(
                join("the added token at ", entry.path(), " has an id that is not its place"))
                .found(written, " for ", Json(token.content).dump())
                .allowed(token.id, ", which tokenizers gives it")
                .next("save the tokenizer again with tokenizers or transformers");
        }
        if (!added_ids_.emplace(token.content, token.id).second) {
            throw bad_tokenizer(join("an added token comes twice, at ", entry.path()))
                .found(Json(token.content).dump());
        }
        largest = std::max(largest, token.id);
        tokens.push_back(std::move(token));
    }
    add_to_finders(tokens);
    spell_tokens(tokens);
}

// A normalized token is from here on what the normalizer makes of it, as in tokenizers: it is found
// as that, decoded to that, and special only if that is the content of a special token.
void Tokenizer::add_to_finders(std::vector<AddedToken>& tokens) {
    std::unordered_set<std::string> special;
    for (const AddedToken& token : tokens) {
        if (token.special) special.insert(token.content);
    }
    MatchMemory memory;
    for (const bool specials : {true, false}) {  // special ones win where two become equal
        for (AddedToken& token : tokens) {
            if (token.special != specials) continue;
            if (token.normalized && normalizer_) normalizer_->apply(token.content, memory);
            (token.normalized ? normalized_tokens_ : raw_tokens_).add(token);
        }
    }
    for (AddedToken& token : tokens) token.special = special.count(token.content) > 0;
}

void Tokenizer::spell_tokens(const std::vector<AddedToken>& added) {
    uint32_t size = 0;
    for (const auto& [content, id] : bpe_->vocab()) size = std::max(size, id + 1);
    for (const AddedToken& token : added) size = std::max(size, token.id + 1);
    tokens_.resize(size);
    const auto spell = [&](const std::string& content, uint32_t id, bool special) {
        const std::string spelled = decoder_.prepare(content);
        tokens_[id] = {spelled_.size(), spelled.size(), true, special};
        spelled_ += spelled;
    };
    for (const auto& [content, id] : bpe_->vocab()) spell(content, id, false);
    for (const AddedToken& token : added) spell(token.content, token.id, token.special);
}

// ---- encoding and decoding --------------------------------------------------------------------

std::vector<uint32_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
    if (text.size() >= kMaxText) {
        throw invalid("the text is too long")
            .found(text.size(), " bytes")
            .allowed("less than ", kMaxText)
            .next("encode it in parts");
    }
    const size_t wrong = find_invalid_utf8(text);
    if (wrong != std::string_view::npos) {
        throw invalid("the text is not UTF-8")
            .found("byte ", static_cast<int>(static_cast<unsigned char>(text[wrong])),
                   " at offset ", wrong)
            .next("convert it to UTF-8");
    }
    Loan loan(*this);
    Memory& memory = *loan;
    std::vector<uint32_t> ids;
    ids.reserve(text.size() / 3 + 16);
    if (add_special_tokens) ids = post_processor_.before;
    memory.raw.clear();
    raw_tokens_.split(text, memory.raw);
    for (const Segment& segment : memory.raw) {
        encode_segment(segment, segment.text.data() == text.data(), memory, ids);
    }
    if (add_special_tokens)
        ids.insert(ids.end(), post_processor_.after.begin(), post_processor_.after.end());
    return ids;
}

void Tokenizer::encode_segment(const Segment& segment, bool at_start, Memory& memory,
                               std::vector<uint32_t>& ids) const {
    if (segment.id >= 0) {
        ids.push_back(static_cast<uint32_t>(segment.id));
        return;
    }
    std::string_view text = segment.text;
    if (normalizer_) {
        memory.text = text;
        normalizer_->apply(memory.text, memory.split.match);
        text = memory.text;
    }
    memory.normalized.clear();
    normalized_tokens_.split(text, memory.normalized);
    for (const Segment& part : memory.normalized) {
        if (part.id >= 0) {
            ids.push_back(static_cast<uint32_t>(part.id));
        } else {
            encode_text(part.text, at_start && part.text.data() == text.data(), memory, ids);
        }
    }
}

void Tokenizer::encode_text(std::string_view text, bool at_start, Memory& memory,
                            std::vector<uint32_t>& ids) const {
    if (text.empty()) return;
    memory.split.changed.clear();
    memory.split.pieces.assign(1, Piece{text, at_start});
    pre_tokenizer_.run(memory.split);
    for (const Piece& piece : memory.split.pieces) bpe_->encode(piece.text, memory.bpe, ids);
}

void Tokenizer::decode(uint32_t id, bool skip_special_tokens, DecoderStage& chain) const {
    if (id >= tokens_.size()) return;
    const Token& token = tokens_[id];
    if (!token.exists || (token.special && skip_special_tokens)) return;
    chain.push(std::string_view(spelled_).substr(token.begin, token.size));
}

std::optional<uint32_t> Tokenizer::token_id(std::string_view content) const {
    const std::string key(content);
    if (const auto added = added_ids_.find(key); added != added_ids_.end()) return added->second;
    if (const auto found = bpe_->vocab().find(key); found != bpe_->vocab().end())
        return found->second;
    return std::nullopt;
}

}  // namespace mla::text
