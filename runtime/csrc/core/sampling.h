// From logits to the next token. The order is that of transformers, so that the same options mean
// the same:
//
// 1. repetition penalty on every token that occurred: a positive logit is divided by it, a negative
//    one multiplied (Keskar et al., arXiv 1909.05858);
// 2. temperature: 0 takes the largest logit and ends here, else logits are divided by it;
// 3. top-k: the k largest logits stay;
// 4. top-p: of these, most likely first, as many as reach the probability together stay, at least
//    one (Holtzman et al., arXiv 1904.09751);
// 5. min-p: of these, tokens less likely than min_p times the most likely one go (arXiv
// 2407.01082);
// 6. one uniform number per token picks by the cumulative distribution.
//
// Of equal logits, the one of the lower token id counts as the larger.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "core/random.h"
#include "mla_deploy/runtime.h"

namespace mla::core {

struct SamplingOptions {
    double temperature = 0;
    double top_p = 1;
    double min_p = 0;
    double repetition_penalty = 1;
    uint32_t top_k = 0;
    std::optional<uint64_t> seed;

    // Errors: MLA_INVALID_ARGUMENT.
    void check() const;
};

// Picks tokens of one sequence. One thread at a time.
class Sampler {
  public:
    // Errors: MLA_INVALID_ARGUMENT.
    Sampler(const SamplingOptions& options, uint32_t vocab_size);

    size_t vocab_size() const { return occurred_.size(); }

    // Notes a token of the sequence, which must be in the vocabulary.
    void observe(mla_token token) { occurred_[static_cast<size_t>(token)] = 1; }

    // Notes tokens, all or none. Errors: MLA_INVALID_ARGUMENT.
    void observe(const mla_token* tokens, size_t count);

    // Whether so many logits are those of the vocabulary. Errors: MLA_INVALID_ARGUMENT.
    void check_size(size_t logits) const;

    // The next token. logits: [vocab_size]. Errors: MLA_MODEL_FAILED.
    mla_token pick(const float* logits);

    // The tokens that can be picked and their probabilities.
    struct Distribution {
        std::vector<mla_token> tokens;
        std::vector<double> probabilities;
    };
    Distribution distribution(const float* logits) const;

  private:
    std::vector<double> penalised(const float* logits) const;
    std::vector<mla_token> candidates(const std::vector<double>& scores) const;

    SamplingOptions options_;
    Random random_;
    std::vector<char> occurred_;
};

}  // namespace mla::core
