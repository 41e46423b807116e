// tokenizer.json read value by value, each of the type wanted. The parser is nlohmann/json.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
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

    // Nothing where the field is missing or null.
    std::optional<Config> find(const char* name) const {
        if (!value_->is_object()) throw bad("an object");
        const auto found = value_->find(name);
        if (found == value_->end() || found->is_null()) return std::nullopt;
        return Config(*found, path_.empty() ? name : path_ + "." + name);
    }
    Config at(const char* name) const {
        auto found = find(name);
        if (!found) throw bad(join("an object with the field \"", name, "\""));
        return *std::move(found);
    }

    size_t size() const {
        if (!value_->is_array()) throw bad("a list");
        return value_->size();
    }
    Config operator[](size_t i) const { return Config((*value_)[i], join(path_, "[", i, "]")); }

    const std::string& text() const {
        if (!value_->is_string()) throw bad("a string");
        return value_->get_ref<const std::string&>();
    }
    bool boolean() const {
        if (!value_->is_boolean()) throw bad("true or false");
        return value_->get<bool>();
    }
    uint32_t integer(uint32_t end) const {
        if (!value_->is_number_unsigned() || value_->get<uint64_t>() >= end) {
            throw bad(join("an integer from 0 to ", end - 1));
        }
        return static_cast<uint32_t>(value_->get<uint64_t>());
    }
    bool boolean(const char* name, bool otherwise) const {
        const auto found = find(name);
        return found ? found->boolean() : otherwise;
    }

    Error bad(const std::string& allowed) const {
        return bad_tokenizer("wrong value at " + (path_.empty() ? "the top" : path_))
            .found(excerpt())
            .allowed(allowed)
            .next("take tokenizer.json from the model again");
    }

    // The value, shortened for a message.
    std::string excerpt() const {
        if (value_->is_structured()) return join("a JSON ", value_->type_name());
        std::string text = value_->dump(-1, ' ', true);  // ASCII, so that it can be cut anywhere
        if (text.size() > 60) text = text.substr(0, 57) + "...";
        return text;
    }

  private:
    const Json* value_;
    std::string path_;
};

// How often one component may stand within another (Sequence of Sequence of ...).
constexpr int kMaxDepth = 8;

// For components of a type that is none of ours. what: "pre-tokenizer"; allowed: the types.
inline Error unknown_component(const Config& config, const char* what, const char* allowed) {
    return unsupported(join("the ", what, " at ", config.path()))
        .found(config.find("type") ? config.at("type").excerpt() : config.excerpt())
        .allowed(allowed);
}

}  // namespace mla::text
