// tokenizer.json read value by value, each of the type wanted. The parser is nlohmann/json, whose
// header is long: only the files that look at values themselves include it.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>

#include "text/error.h"

namespace mla::text {

using Json = nlohmann::json;

// Ids are indices of arrays here, so that an absurd one must not take gigabytes. The largest
// vocabularies have 2^18 tokens.
constexpr uint32_t kMaxIds = 1u << 22;

class Config {
  public:
    // path: for errors, such as "pre_tokenizer.pretokenizers[2]"; empty for the whole file.
    Config(const Json& value, std::string path) : value_(&value), path_(std::move(path)) {}

    const Json& json() const { return *value_; }
    const std::string& path() const { return path_; }

    // The field of an object; nothing where it is missing or null.
    std::optional<Config> find(const char* name) const;
    Config at(const char* name) const;

    // Of a list.
    size_t size() const;
    Config operator[](size_t i) const;

    const std::string& text() const;
    bool boolean() const;
    bool boolean(const char* name, bool otherwise) const;
    uint32_t integer(uint32_t end) const;  // below `end`

    Error bad(const std::string& allowed) const;

    // The value, shortened for a message.
    std::string excerpt() const;

  private:
    const Json* value_;
    std::string path_;
};

// How often one component may stand within another (Sequence of Sequence of ...).
constexpr int kMaxDepth = 8;

// For components of a type that is none of ours. what: "pre-tokenizer"; allowed: the types.
Error unknown_component(const Config& config, const char* what, const char* allowed);

}  // namespace mla::text
