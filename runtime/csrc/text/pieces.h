// Ordinary text on its way to the model, cut smaller at each step.
#pragma once

#include <deque>
#include <string>
#include <string_view>
#include <vector>

#include "text/regex.h"

namespace mla::text {

struct Piece {
    std::string_view text;  // never empty
    bool at_start;          // begins where the whole input begins
};

// What one call of encode works with; used again by later ones.
struct SplitMemory {
    MatchMemory match;
    std::vector<Span> spans;
    std::deque<std::string> changed;  // pieces that are no longer part of the input; addresses stay
    std::vector<Piece> pieces, next;
};

}  // namespace mla::text
