// The alphabet of byte-level BPE: each byte as one printable character. Bytes that print as they
// are stand for themselves, the other 68 for U+0100 and on, in order (GPT-2's bytes_to_unicode).
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "text/utf8.h"

namespace mla::text {

constexpr char32_t kByteAlphabetEnd = 0x144;

constexpr bool prints_as_is(int byte) {
    return (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

inline const std::array<char32_t, 256>& byte_to_char() {
    static const std::array<char32_t, 256> table = [] {
        std::array<char32_t, 256> chars{};
        char32_t other = 0x100;
        for (int byte = 0; byte < 256; ++byte) {
            chars[byte] = prints_as_is(byte) ? static_cast<char32_t>(byte) : other++;
        }
        return chars;
    }();
    return table;
}

// -1 for a character that is not in the alphabet.
inline int char_to_byte(char32_t code) {
    static const std::array<int16_t, kByteAlphabetEnd> table = [] {
        std::array<int16_t, kByteAlphabetEnd> bytes{};
        bytes.fill(-1);
        for (int byte = 0; byte < 256; ++byte)
            bytes[byte_to_char()[byte]] = static_cast<int16_t>(byte);
        return bytes;
    }();
    return code < kByteAlphabetEnd ? table[code] : -1;
}

// The bytes that a token spells. A token with a character from outside the alphabet, such as an
// added one, spells itself; `all` then is false.
inline std::string spelled_bytes(std::string_view token, bool* all = nullptr) {
    std::string bytes;
    for (size_t at = 0; at < token.size();) {
        const int byte = char_to_byte(next_code_point(token, at));
        if (byte < 0) {
            if (all) *all = false;
            return std::string(token);
        }
        bytes.push_back(static_cast<char>(byte));
    }
    if (all) *all = true;
    return bytes;
}

}  // namespace mla::text
