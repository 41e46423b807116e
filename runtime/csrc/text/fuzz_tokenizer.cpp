// Fuzzes tokenizer.json: whatever opens must encode, decode and stream without a fault.
//
//     fuzz_tokenizer SEED_FOLDER_OR_FILES...      (Clang: libFuzzer's own options and corpus)
//     fuzz_tokenizer --runs 5000 --seed 1 FILES   (others: mutations of the files given)
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "mla_deploy/text.h"

namespace {

void check(bool good, const char* what) {
    if (good) return;
    std::fprintf(stderr, "fuzz_tokenizer: %s: %s\n", what, mla_text_last_error());
    std::abort();
}

const std::string kText =
    "<s> Hello  world's 12345\n\n\t<|x|>caf\xc3\xa9 e\xcc\x81 \xe4\xb8\xad\xe6\x96\x87 "
    "\xf0\x9f\x98\x80"
    " \xe2\x96\x81the\xe2\x80\x8b \xe0\xa2\x97 "
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa</s>";

void exercise(mla_tokenizer* tokenizer) {
    uint32_t vocab = 0;
    check(mla_tokenizer_vocab_size(tokenizer, &vocab) == MLA_TEXT_OK, "vocab_size");
    std::vector<mla_token> ids(4096);
    size_t count = 0;
    if (mla_tokenizer_encode(tokenizer, kText.data(), kText.size(), 1, ids.data(), ids.size(),
                             &count)) {
        count = 0;
    }
    for (size_t i = 0; i < count; ++i) check(ids[i] >= 0, "a negative id");
    for (uint32_t id = 0; id < 40; ++id)
        ids[count++ % ids.size()] = static_cast<mla_token>(id * 7 - 5);
    count = count < ids.size() ? count : ids.size();
    std::string text(1 << 20, '\0');
    size_t length = 0;
    for (const int skip : {0, 1}) {
        if (mla_tokenizer_decode(tokenizer, ids.data(), count, skip, &text[0], text.size(),
                                 &length))
            continue;
        mla_text_stream* stream = nullptr;
        check(mla_text_stream_create(tokenizer, skip, &stream) == MLA_TEXT_OK, "stream_create");
        std::string joined;
        const char* piece = nullptr;
        size_t size = 0;
        for (size_t i = 0; i < count; ++i) {
            check(mla_text_stream_push(stream, ids[i], &piece, &size) == MLA_TEXT_OK, "push");
            joined.append(piece, size);
        }
        check(mla_text_stream_flush(stream, &piece, &size) == MLA_TEXT_OK, "flush");
        joined.append(piece, size);
        check(joined == text.substr(0, length), "the stream differs from decode");
        check(mla_text_stream_destroy(stream) == MLA_TEXT_OK, "stream_destroy");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    mla_tokenizer* tokenizer = nullptr;
    if (mla_tokenizer_open_bytes(reinterpret_cast<const char*>(data), size, &tokenizer)) return 0;
    exercise(tokenizer);
    check(mla_tokenizer_close(tokenizer) == MLA_TEXT_OK, "close");
    return 0;
}

#ifndef MLA_LIBFUZZER

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>

namespace {

using Json = nlohmann::json;

// Pieces of JSON that mean something here, to be put where others stood.
const char* const kPieces[] = {"null",
                               "true",
                               "false",
                               "-1",
                               "0",
                               "4294967296",
                               "1e9",
                               "[]",
                               "{}",
                               "\"\"",
                               "\"A\"",
                               "\"type\"",
                               "\"Sequence\"",
                               "\"ByteLevel\"",
                               "\"Split\"",
                               "\"Replace\"",
                               "\"Fuse\"",
                               "\"Strip\"",
                               "\"Metaspace\"",
                               "\"Digits\"",
                               "\"NFC\"",
                               "\"Prepend\"",
                               "\"ByteFallback\"",
                               "\"Removed\"",
                               "\"MergedWithNext\"",
                               "\"Contiguous\"",
                               "\"Regex\"",
                               "\"String\"",
                               "\"(\"",
                               "\"[a&&[^b]]\"",
                               "\"(a*)*$\"",
                               "\"\\\\p{L}+\"",
                               "\"\\ud800\"",
                               "\"\\u0000\"",
                               ",",
                               ":",
                               "{",
                               "}",
                               "[",
                               "]",
                               "\xff",
                               "\"\xe2\x96\x81\""};

using Random = std::mt19937;
size_t below(Random& random, size_t end) { return end ? random() % end : 0; }

std::string mutate_bytes(std::string text, Random& random) {
    for (size_t n = 1 + below(random, 3); n > 0; --n) {
        const size_t at = below(random, text.size());
        const char* piece = kPieces[below(random, std::size(kPieces))];
        switch (below(random, 5)) {
            case 0:
                text[at] = static_cast<char>(random());
                break;
            case 1:
                text.erase(at, 1 + below(random, 8));
                break;
            case 2:
                text.insert(at, piece);
                break;
            case 3:
                text.insert(at, text.substr(below(random, text.size()), below(random, 64)));
                break;
            default:
                text.resize(at + 1);
        }
    }
    return text;
}

// All values within, but of the long lists and objects only a few.
void collect(Json& value, Random& random, std::vector<Json*>& out) {
    out.push_back(&value);
    if (!value.is_structured()) return;
    const size_t every = 1 + value.size() / 12;
    for (Json& child : value) {
        if (below(random, every) == 0) collect(child, random, out);
    }
}

// Values change, vanish, or take another's place.
std::string mutate_values(const std::string& text, Random& random) {
    Json root = Json::parse(text);
    for (size_t n = 1 + below(random, 4); n > 0; --n) {
        std::vector<Json*> values;
        collect(root, random, values);
        Json& value = *values[below(random, values.size())];
        const Json other = *values[below(random, values.size())];
        const Json piece = Json::parse(kPieces[below(random, std::size(kPieces))], nullptr, false);
        switch (below(random, 6)) {
            case 0:
                value = other;
                break;
            case 1:
                if (value.is_array()) value.push_back(other);
                break;
            case 2:
                if (value.is_array() && !value.empty()) value.erase(below(random, value.size()));
                break;
            case 3:
                if (value.is_boolean()) value = !value.get<bool>();
                if (value.is_number()) value = static_cast<uint64_t>(below(random, 300));
                break;
            case 4:
                if (value.is_string()) {  // a pattern that is nearly right
                    auto& own = value.get_ref<std::string&>();
                    if (!own.empty())
                        own.insert(below(random, own.size()), 1,
                                   "()[]{}|*+?\\^$-&<>a"[below(random, 19)]);
                }
                break;
            default:
                if (!piece.is_discarded()) value = piece;
        }
    }
    return root.dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string mutate(const std::string& text, Random& random) {
    std::string mutated =
        below(random, 4) ? mutate_values(text, random) : mutate_bytes(text, random);
    return mutated.empty() ? "{" : mutated;
}

}  // namespace

int main(int argc, char** argv) {
    size_t runs = 1000;
    unsigned seed = 1;
    std::vector<std::string> inputs;
    for (int i = 1; i < argc; ++i) {
        if (!std::strcmp(argv[i], "--runs") && i + 1 < argc) {
            runs = std::strtoul(argv[++i], nullptr, 10);
        } else if (!std::strcmp(argv[i], "--seed") && i + 1 < argc) {
            seed = static_cast<unsigned>(std::strtoul(argv[++i], nullptr, 10));
        } else {
            std::ifstream file(argv[i], std::ios::binary);
            inputs.emplace_back(std::istreambuf_iterator<char>(file),
                                std::istreambuf_iterator<char>());
        }
    }
    if (inputs.empty()) {
        std::fprintf(stderr, "usage: fuzz_tokenizer [--runs N] [--seed N] FILES\n");
        return 2;
    }
    Random random(seed);
    size_t opened = 0;
    for (const std::string& input : inputs) {
        mla_tokenizer* tokenizer = nullptr;
        check(mla_tokenizer_open_bytes(input.data(), input.size(), &tokenizer) == MLA_TEXT_OK,
              "a seed");
        mla_tokenizer_close(tokenizer);
    }
    for (size_t run = 0; run < runs; ++run) {
        const std::string text = mutate(inputs[random() % inputs.size()], random);
        // What a crash leaves behind.
        std::ofstream("fuzz_tokenizer.last", std::ios::binary) << text;
        mla_tokenizer* tokenizer = nullptr;
        if (mla_tokenizer_open_bytes(text.data(), text.size(), &tokenizer) == MLA_TEXT_OK) {
            ++opened;
            mla_tokenizer_close(tokenizer);
            LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(text.data()), text.size());
        }
    }
    std::printf("%zu runs, %zu of them valid tokenizers\n", runs, opened);
    return 0;
}

#endif
