#include "text/utf8.h"

#include <cstring>

namespace mla::text {
namespace {

// Length of a character by its first byte, and what the second may be; 0: no first byte at all.
int lead_of(unsigned char lead, unsigned char& low, unsigned char& high) {
    low = 0x80;
    high = 0xbf;
    if (lead < 0x80) return 1;
    if (lead < 0xc2 || lead > 0xf4) return 0;
    if (lead < 0xe0) return 2;
    if (lead < 0xf0) {
        if (lead == 0xe0) low = 0xa0;
        if (lead == 0xed) high = 0x9f;  // no surrogates
        return 3;
    }
    if (lead == 0xf0) low = 0x90;
    if (lead == 0xf4) high = 0x8f;
    return 4;
}

constexpr std::string_view kReplacement = "\xef\xbf\xbd";

}  // namespace

size_t find_invalid_utf8(std::string_view text) {
    const char* data = text.data();
    const size_t size = text.size();
    size_t i = 0;
    while (i < size) {
        uint64_t eight;
        if (i + 8 <= size &&
            (std::memcpy(&eight, data + i, 8), (eight & 0x8080808080808080) == 0)) {
            i += 8;
            continue;
        }
        unsigned char low, high;
        const int length = lead_of(static_cast<unsigned char>(data[i]), low, high);
        if (length == 0 || size - i < static_cast<size_t>(length)) return i;
        for (int k = 1; k < length; ++k) {
            const auto byte = static_cast<unsigned char>(data[i + k]);
            if (byte < low || byte > high) return i;
            low = 0x80;
            high = 0xbf;
        }
        i += length;
    }
    return std::string_view::npos;
}

void append_utf8(std::string& text, char32_t code) {
    const auto put = [&](char32_t byte) { text.push_back(static_cast<char>(byte)); };
    if (code < 0x80) {
        put(code);
    } else if (code < 0x800) {
        put(0xc0 | code >> 6);
        put(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        put(0xe0 | code >> 12);
        put(0x80 | (code >> 6 & 0x3f));
        put(0x80 | (code & 0x3f));
    } else {
        put(0xf0 | code >> 18);
        put(0x80 | (code >> 12 & 0x3f));
        put(0x80 | (code >> 6 & 0x3f));
        put(0x80 | (code & 0x3f));
    }
}

void LossyUtf8::push(std::string_view bytes, std::string& out) {
    size_t i = 0;
    while (i < bytes.size()) {
        if (!pending()) {  // whole characters at once
            size_t valid = find_invalid_utf8(bytes.substr(i));
            if (valid == std::string_view::npos) valid = bytes.size() - i;
            out.append(bytes.substr(i, valid));
            i += valid;
            if (i == bytes.size()) return;
        }
        push_byte(static_cast<unsigned char>(bytes[i++]), out);
    }
}

void LossyUtf8::push_byte(unsigned char byte, std::string& out) {
    if (pending()) {
        if (byte >= low_ && byte <= high_) {
            pending_[pending_size_++] = static_cast<char>(byte);
            low_ = 0x80;
            high_ = 0xbf;
            if (pending_size_ == wanted_) {
                out.append(pending_, static_cast<size_t>(pending_size_));
                pending_size_ = 0;
            }
            return;
        }
        flush(out);
    }
    wanted_ = lead_of(byte, low_, high_);
    if (wanted_ == 0) {
        out.append(kReplacement);
    } else if (wanted_ == 1) {
        out.push_back(static_cast<char>(byte));
    } else {
        pending_[0] = static_cast<char>(byte);
        pending_size_ = 1;
    }
}

void LossyUtf8::flush(std::string& out) {
    if (pending()) out.append(kReplacement);
    pending_size_ = 0;
}

}  // namespace mla::text
