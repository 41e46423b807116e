#include "core/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/error.h"

namespace mla::core {

namespace {

// Top-p sorts so many tokens first: to sort a vocabulary of 100k takes milliseconds a token.
constexpr size_t kFirstLook = 256;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

void check_number(const char* name, double value, double least, double most, bool above = false) {
    if (std::isfinite(value) && (above ? value > least : value >= least) && value <= most) return;
    const std::string allowed = join(above ? "above " : "at least ", least);
    throw invalid(join(name, " is out of range"))
        .found(value)
        .allowed(most == kInfinity ? allowed : join(allowed, ", at most ", most));
}

void check_finite(const float* logits, size_t count) {
    float top = -std::numeric_limits<float>::infinity();
    for (size_t i = 0; i < count && !std::isnan(top); ++i) {
        if (!(logits[i] <= top)) top = logits[i];  // larger, or not a number
    }
    if (std::isfinite(top)) return;
    throw Error(MLA_MODEL_FAILED, "the model's logits are not finite")
        .found(top)
        .next(
            "check the checkpoint for broken weights; a model that overflows in fp16 needs "
            "another export");
}

// Ids of the `count` largest scores, in falling order.
std::vector<mla_token> largest(const std::vector<double>& scores, size_t count) {
    std::vector<mla_token> ids(scores.size());
    std::iota(ids.begin(), ids.end(), 0);
    const auto before = [&](mla_token a, mla_token b) {
        const double x = scores[static_cast<size_t>(a)], y = scores[static_cast<size_t>(b)];
        return x > y || (x == y && a < b);
    };
    const auto end = ids.begin() + static_cast<std::ptrdiff_t>(count);
    if (end != ids.end()) std::nth_element(ids.begin(), end, ids.end(), before);
    std::sort(ids.begin(), end, before);
    ids.resize(count);
    return ids;
}

double weight(const std::vector<double>& scores, mla_token id) {
    return std::exp(scores[static_cast<size_t>(id)]);
}

// How many of the tokens, in falling order, reach `top_p` of the total weight together.
size_t cut(const std::vector<double>& scores, const std::vector<mla_token>& falling, double top_p,
           double total) {
    double reached = 0;
    for (size_t i = 0; i < falling.size(); ++i) {
        reached += weight(scores, falling[i]);
        if (reached / total >= top_p) return i + 1;
    }
    return falling.size();
}

// Ids of the most likely tokens that have the probability `top_p` together.
std::vector<mla_token> nucleus(const std::vector<double>& scores, double top_p) {
    double total = 0;
    for (const double score : scores) total += std::exp(score);
    for (size_t looked_at = std::min(kFirstLook, scores.size());;
         looked_at = std::min(8 * looked_at, scores.size())) {
        std::vector<mla_token> ids = largest(scores, looked_at);
        const size_t size = cut(scores, ids, top_p, total);
        if (size < looked_at || looked_at == scores.size()) {
            ids.resize(size);
            return ids;
        }
    }
}

}  // namespace

void SamplingOptions::check() const {
    check_number("temperature", temperature, 0, kInfinity);
    check_number("top_p", top_p, 0, 1, true);
    check_number("min_p", min_p, 0, 1);
    check_number("repetition_penalty", repetition_penalty, 0, kInfinity, true);
}

Sampler::Sampler(const SamplingOptions& options, uint32_t vocab_size)
    : options_(options),
      random_(options.seed ? *options.seed : random_seed()),
      occurred_(vocab_size, 0) {
    if (vocab_size == 0) throw invalid("vocab_size is out of range").found(0).allowed("above 0");
    options_.check();
}

void Sampler::observe(const mla_token* tokens, size_t count) {
    const auto size = static_cast<int64_t>(vocab_size());
    for (size_t i = 0; i < count; ++i) {
        if (tokens[i] >= 0 && tokens[i] < size) continue;
        throw invalid("a token is not in the vocabulary")
            .found(tokens[i])
            .allowed("0 to ", size - 1);
    }
    for (size_t i = 0; i < count; ++i) observe(tokens[i]);
}

void Sampler::check_size(size_t logits) const {
    if (logits == vocab_size()) return;
    throw invalid("the logits are not of the sampler's vocabulary")
        .found(logits)
        .allowed(vocab_size());
}

mla_token Sampler::pick(const float* logits) {
    if (options_.temperature == 0) {
        check_finite(logits, vocab_size());
        if (options_.repetition_penalty == 1) {  // no copy of the logits
            return static_cast<mla_token>(std::max_element(logits, logits + vocab_size()) - logits);
        }
        const std::vector<double> scores = penalised(logits);
        return static_cast<mla_token>(std::max_element(scores.begin(), scores.end()) -
                                      scores.begin());
    }
    const Distribution found = distribution(logits);
    double total = 0;
    for (const double probability : found.probabilities) total += probability;
    const double drawn = random_.uniform() * total;
    double cumulative = 0;
    size_t last = 0;  // that is possible, in case rounding leaves `drawn` beyond the end
    for (size_t i = 0; i < found.tokens.size(); ++i) {
        cumulative += found.probabilities[i];
        if (cumulative > drawn) return found.tokens[i];
        if (found.probabilities[i] > 0) last = i;
    }
    return found.tokens[last];
}

Sampler::Distribution Sampler::distribution(const float* logits) const {
    check_finite(logits, vocab_size());
    std::vector<double> scores = penalised(logits);
    const double top = *std::max_element(scores.begin(), scores.end());
    if (options_.temperature == 0) {  // all on the first of the largest
        const auto at = std::find(scores.begin(), scores.end(), top) - scores.begin();
        return {{static_cast<mla_token>(at)}, {1.0}};
    }
    for (double& score : scores) score = (score - top) / options_.temperature;
    Distribution result;
    result.tokens = candidates(scores);
    double total = 0;
    for (const mla_token id : result.tokens) {
        result.probabilities.push_back(weight(scores, id));
        total += result.probabilities.back();
    }
    for (double& probability : result.probabilities) probability /= total;
    return result;
}

std::vector<double> Sampler::penalised(const float* logits) const {
    std::vector<double> scores(logits, logits + vocab_size());
    const auto penalty = static_cast<float>(options_.repetition_penalty);
    if (penalty == 1.0f) return scores;
    for (size_t i = 0; i < scores.size(); ++i) {
        if (!occurred_[i]) continue;
        scores[i] = logits[i] > 0 ? logits[i] / penalty : logits[i] * penalty;  // in float
        if (std::isnan(scores[i]) || scores[i] == kInfinity) {
            throw invalid("the repetition penalty leaves the range of numbers")
                .found(options_.repetition_penalty)
                .next("use one near 1, such as 1.1");
        }
    }
    return scores;
}

// Steps 3 to 5. scores: scaled, the largest one 0.
std::vector<mla_token> Sampler::candidates(const std::vector<double>& scores) const {
    std::vector<mla_token> ids;
    const bool top_k = options_.top_k > 0 && options_.top_k < scores.size();
    if (top_k) ids = largest(scores, options_.top_k);
    if (options_.top_p < 1) {
        if (top_k) {
            double total = 0;
            for (const mla_token id : ids) total += weight(scores, id);
            ids.resize(cut(scores, ids, options_.top_p, total));
        } else {
            ids = nucleus(scores, options_.top_p);
        }
    }
    if (ids.empty()) {
        ids.resize(scores.size());
        std::iota(ids.begin(), ids.end(), 0);
    }
    if (options_.min_p > 0) {
        const double least = std::log(options_.min_p);
        ids.erase(
            std::remove_if(ids.begin(), ids.end(),
                           [&](mla_token id) { return scores[static_cast<size_t>(id)] < least; }),
            ids.end());
    }
    return ids;
}

}  // namespace mla::core
