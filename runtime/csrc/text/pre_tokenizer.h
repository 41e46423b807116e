// Splitting text into the words that BPE sees: the field "pre_tokenizer".
#pragma once

#include <memory>
#include <vector>

#include "text/config.h"
#include "text/pieces.h"

namespace mla::text {

// One step: appends the parts of a piece.
class SplitStep {
  public:
    virtual ~SplitStep() = default;
    virtual void apply(const Piece& piece, SplitMemory& memory, std::vector<Piece>& out) const = 0;
};

struct PreTokenizer {
    std::vector<std::unique_ptr<const SplitStep>> steps;
    bool byte_level = false;  // words are spelled in the alphabet of byte_level.h

    // Takes memory.pieces through all steps.
    void run(SplitMemory& memory) const;
};

PreTokenizer read_pre_tokenizer(const Config& config);

}  // namespace mla::text
