// What becomes of the matches of a pattern that splits text.
#pragma once

#include <cstddef>
#include <vector>

#include "text/config.h"
#include "text/regex.h"

namespace mla::text {

enum class SplitBehavior {
    kIsolated,            // each match is a part
    kRemoved,             // no part has a match
    kMergedWithPrevious,  // a match ends the part before it
    kMergedWithNext,      // a match begins the part after it
    kContiguous,          // adjacent matches are one part
};

SplitBehavior read_split_behavior(const Config& config);

// Turns the matches in a text of `size` bytes into its parts, in place. inverted: the text between
// matches takes their role.
void split(std::vector<Span>& spans, size_t size, SplitBehavior behavior, bool inverted);

}  // namespace mla::text
