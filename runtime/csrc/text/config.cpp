#include "text/config.h"

#include <nlohmann/json.hpp>

namespace mla::text {

std::optional<Config> Config::find(const char* name) const {
    if (!value_->is_object()) throw bad("an object");
    const auto found = value_->find(name);
    if (found == value_->end() || found->is_null()) return std::nullopt;
    return Config(*found, path_.empty() ? name : path_ + "." + name);
}

Config Config::at(const char* name) const {
    auto found = find(name);
    if (!found) throw bad(join("an object with the field \"", name, "\""));
    return *std::move(found);
}

size_t Config::size() const {
    if (!value_->is_array()) throw bad("a list");
    return value_->size();
}

Config Config::operator[](size_t i) const { return Config((*value_)[i], join(path_, "[", i, "]")); }

const std::string& Config::text() const {
    if (!value_->is_string()) throw bad("a string");
    return value_->get_ref<const std::string&>();
}

bool Config::boolean() const {
    if (!value_->is_boolean()) throw bad("true or false");
    return value_->get<bool>();
}

bool Config::boolean(const char* name, bool otherwise) const {
    const auto found = find(name);
    return found ? found->boolean() : otherwise;
}

uint32_t Config::integer(uint32_t end) const {
    if (!value_->is_number_unsigned() || value_->get<uint64_t>() >= end) {
        throw bad(join("an integer from 0 to ", end - 1));
    }
    return static_cast<uint32_t>(value_->get<uint64_t>());
}

Error Config::bad(const std::string& allowed) const {
    return bad_tokenizer("wrong value at " + (path_.empty() ? "the top" : path_))
        .found(excerpt())
        .allowed(allowed)
        .next("take tokenizer.json from the model again");
}

std::string Config::excerpt() const {
    if (value_->is_structured()) return join("a JSON ", value_->type_name());
    std::string text = value_->dump(-1, ' ', true);  // ASCII, so that it can be cut anywhere
    if (text.size() > 60) text = text.substr(0, 57) + "...";
    return text;
}

Error unknown_component(const Config& config, const char* what, const char* allowed) {
    const auto type = config.find("type");
    return unsupported(join("the ", what, " at ", config.path()))
        .found(type ? type->excerpt() : config.excerpt())
        .allowed(allowed);
}

}  // namespace mla::text
