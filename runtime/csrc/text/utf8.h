// UTF-8: checking, reading and writing code points.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace mla::text {

// Offset of the first byte that is not part of well-formed UTF-8, or npos.
size_t find_invalid_utf8(std::string_view text);

// Bytes of the character that begins with `lead`, in text known to be valid.
inline int utf8_length(unsigned char lead) {
    return lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
}

// Reads the code point at `at` and moves behind it; the text must be valid.
inline char32_t next_code_point(std::string_view text, size_t& at) {
    const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
    const unsigned char lead = byte(0);
    if (lead < 0x80) {
        at += 1;
        return lead;
    }
    char32_t code;
    if (lead < 0xe0) {
        code = (lead & 0x1fu) << 6 | (byte(1) & 0x3fu);
        at += 2;
    } else if (lead < 0xf0) {
        code = (lead & 0x0fu) << 12 | (byte(1) & 0x3fu) << 6 | (byte(2) & 0x3fu);
        at += 3;
    } else {
        code = (lead & 0x07u) << 18 | (byte(1) & 0x3fu) << 12 | (byte(2) & 0x3fu) << 6 |
               (byte(3) & 0x3fu);
        at += 4;
    }
    return code;
}

void append_utf8(std::string& text, char32_t code);

// Turns bytes into UTF-8 as they come. What is none becomes U+FFFD, one for each longest prefix of
// a character, as Unicode recommends and String::from_utf8_lossy of Rust does.
class LossyUtf8 {
  public:
    // Appends to `out` what is complete.
    void push(std::string_view bytes, std::string& out);
    // The character that was cut off, if any.
    void flush(std::string& out);
    bool pending() const { return pending_size_ > 0; }

  private:
    void push_byte(unsigned char byte, std::string& out);

    char pending_[4];
    int pending_size_ = 0;
    int wanted_ = 0;                    // bytes of the pending character in all
    unsigned char low_ = 0, high_ = 0;  // what its next byte may be
};

}  // namespace mla::text
