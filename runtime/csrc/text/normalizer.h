// What happens to text before it is split: the field "normalizer".
#pragma once

#include <memory>
#include <string>

#include "text/config.h"
#include "text/regex.h"

namespace mla::text {

class Normalizer {
  public:
    virtual ~Normalizer() = default;
    virtual void apply(std::string& text, MatchMemory& memory) const = 0;
};

std::unique_ptr<const Normalizer> read_normalizer(const Config& config, int depth = 0);

// The field "pattern" of several components: {"String": ...} or {"Regex": ...}.
Regex read_pattern(const Config& config);

// Every match of the pattern replaced by `content`.
void replace_all(std::string& text, const Regex& pattern, const std::string& content,
                 MatchMemory& memory);

}  // namespace mla::text
