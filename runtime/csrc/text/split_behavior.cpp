#include "text/split_behavior.h"

#include <algorithm>
#include <string>

namespace mla::text {
namespace {

struct Part {
    Span span;
    bool match;
};

// The whole text: matches, and what is between them.
std::vector<Part> tile(const std::vector<Span>& matches, size_t size, bool inverted) {
    std::vector<Part> parts;
    parts.reserve(2 * matches.size() + 1);
    size_t at = 0;
    for (const Span& match : matches) {
        if (at < match.begin) parts.push_back({{at, match.begin}, inverted});
        parts.push_back({match, !inverted});
        at = match.end;
    }
    if (at < size) parts.push_back({{at, size}, inverted});
    return parts;
}

// Joins a part with the one before it where joins(it, the one before) says so.
template <class Joins>
void merge(const std::vector<Part>& parts, std::vector<Span>& out, Joins joins) {
    bool last = false;
    for (const Part& part : parts) {
        if (!out.empty() && joins(part.match, last)) {
            out.back().end = part.span.end;
        } else {
            out.push_back(part.span);
        }
        last = part.match;
    }
}

}  // namespace

SplitBehavior read_split_behavior(const Config& config) {
    const std::string& name = config.text();
    if (name == "Isolated") return SplitBehavior::kIsolated;
    if (name == "Removed") return SplitBehavior::kRemoved;
    if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
    if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
    if (name == "Contiguous") return SplitBehavior::kContiguous;
    throw config.bad("Isolated, Removed, MergedWithPrevious, MergedWithNext or Contiguous");
}

void split(std::vector<Span>& spans, size_t size, SplitBehavior behavior, bool inverted) {
    const std::vector<Part> parts = tile(spans, size, inverted);
    spans.clear();
    switch (behavior) {
        case SplitBehavior::kIsolated:
            for (const Part& part : parts) spans.push_back(part.span);
            break;
        case SplitBehavior::kRemoved:
            for (const Part& part : parts) {
                if (!part.match) spans.push_back(part.span);
            }
            break;
        case SplitBehavior::kContiguous:
            merge(parts, spans, [](bool match, bool last) { return match == last; });
            break;
        case SplitBehavior::kMergedWithPrevious:
            merge(parts, spans, [](bool match, bool last) { return match && !last; });
            break;
        case SplitBehavior::kMergedWithNext: {
            bool last = false;  // going backwards, so that of two matches the second is joined
            for (size_t i = parts.size(); i-- > 0;) {
                if (!spans.empty() && parts[i].match && !last) {
                    spans.back().begin = parts[i].span.begin;
                } else {
                    spans.push_back(parts[i].span);
                }
                last = parts[i].match;
            }
            std::reverse(spans.begin(), spans.end());
            break;
        }
    }
    // A match may be empty; a part is not.
    spans.erase(
        std::remove_if(spans.begin(), spans.end(), [](const Span& s) { return s.begin == s.end; }),
        spans.end());
}

}  // namespace mla::text
