// tokenizer.json: whatever opens must encode, decode and stream without a fault, and a stream must
// give what decode gives, in pieces that are UTF-8 each.
#include <string>
#include <vector>

#include "fuzz/check.h"
#include "text/stream.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace {

using namespace mla::text;
using mla::fuzz::check;

const std::string kText =
    "<s> Hello  world's 12345\n\n\t<|x|>caf\xc3\xa9 e\xcc\x81 \xe4\xb8\xad\xe6\x96\x87 "
    "\xf0\x9f\x98\x80 \xe2\x96\x81the\xe2\x80\x8b \xe0\xa2\x97 "
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa</s>";

void exercise(const std::shared_ptr<const Tokenizer>& tokenizer) {
    std::vector<uint32_t> ids;
    mla::fuzz::succeeds([&] { ids = tokenizer->encode(kText, true); });
    if (ids.size() > 1000) ids.resize(1000);
    for (uint32_t id = 0; id < 40; ++id) ids.push_back(id * 7 - 5);
    for (const bool skip : {false, true}) {
        mla::fuzz::succeeds([&] {
            std::string text, joined;
            const auto chain = tokenizer->decoder().chain(text);
            for (const uint32_t id : ids) tokenizer->decode(id, skip, *chain);
            chain->finish();
            Stream stream(tokenizer, skip);
            const auto append = [&](const std::string& piece) {
                check(find_invalid_utf8(piece) == std::string_view::npos, "half a character");
                joined += piece;
            };
            for (const uint32_t id : ids) append(stream.push(id));
            append(stream.flush());
            check(joined == text, "a stream differs from decode");
        });
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    std::shared_ptr<const Tokenizer> tokenizer;
    const auto parse = [&] {
        tokenizer = Tokenizer::parse({reinterpret_cast<const char*>(data), size});
    };
    if (mla::fuzz::succeeds(parse)) exercise(tokenizer);
    return 0;
}
