// A JSON object read field by field, strictly: of the type wanted, in its range, and with no field
// left over. The parser is nlohmann/json; nothing of it leaves the files that include this one.
#pragma once

#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "core/error.h"

namespace mla::core {

using Json = nlohmann::json;

class JsonObject {
  public:
    // where: for errors, such as "cache.layers.3"; empty for the outermost object.
    JsonObject(const Json& value, std::string where) : value_(value), where_(std::move(where)) {
        if (!value.is_object()) throw bad("", "an object");
    }

    bool has(const char* name) const { return value_.contains(name); }

    const Json& any(const char* name) {
        const auto found = value_.find(name);
        if (found == value_.end()) throw bad(name, "a value; it is missing");
        read_.insert(name);
        return *found;
    }

    std::string text(const char* name) {
        const Json& value = any(name);
        if (!value.is_string()) throw bad(name, "a string");
        return value.get<std::string>();
    }

    template <class Integer>
    Integer integer(const char* name, Integer least,
                    Integer most = std::numeric_limits<Integer>::max()) {
        return as_integer(any(name), name, least, most);
    }

    const Json& array(const char* name, size_t least = 0) {
        const Json& value = any(name);
        if (!value.is_array() || value.size() < least) {
            throw bad(name, join("a list of at least ", least));
        }
        return value;
    }

    template <class Integer>
    Integer as_integer(const Json& value, const char* name, Integer least,
                       Integer most = std::numeric_limits<Integer>::max()) const {
        const auto allowed = [&] { return join("an integer from ", least, " to ", most); };
        // Booleans and 1.0 are no integers here.
        if (value.is_number_unsigned()) {
            const auto found = value.get<uint64_t>();
            if (found > static_cast<uint64_t>(most)) throw bad(name, allowed());
            if (least > 0 && found < static_cast<uint64_t>(least)) throw bad(name, allowed());
            return static_cast<Integer>(found);
        }
        if (!value.is_number_integer()) throw bad(name, allowed());
        const auto found = value.get<int64_t>();  // negative, or it would be unsigned
        if (std::is_unsigned_v<Integer> || found < static_cast<int64_t>(least)) {
            throw bad(name, allowed());
        }
        return static_cast<Integer>(found);
    }

    // Call it when everything was read.
    void end() const {
        for (const auto& [name, value] : value_.items()) {
            if (read_.count(name) == 0) throw bad(name.c_str(), "no field of this name");
        }
    }

    Error bad(const std::string& name, const std::string& allowed) const {
        return Error(MLA_BAD_BUNDLE,
                     join("the manifest is not valid at ", name.empty() ? where_ : path_of(name)))
            .allowed(allowed)
            .next("export the model again");
    }

    std::string path_of(const std::string& name) const {
        return where_.empty() ? name : where_ + "." + name;
    }

  private:
    const Json& value_;
    std::string where_;
    std::set<std::string> read_;
};

}  // namespace mla::core
