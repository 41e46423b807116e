// Sampling and generation for Python.
#include "core/generation.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <mutex>
#include <optional>

#include "python/bindings.h"
#include "python/engine_binding.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace mla::core;

namespace {

using Logits = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// A sampler that several threads may call.
class PySampler {
  public:
    PySampler(const SamplingOptions& options, uint32_t vocab_size)
        : sampler_(options, vocab_size) {}

    void observe(const TokenArray& ids) {
        std::vector<mla_token> tokens;
        for (size_t i = 0; i < ids.size(); ++i) {
            const int64_t id = ids.data()[i];
            // one that is none of the vocabulary, either
            tokens.push_back(id == static_cast<mla_token>(id) ? static_cast<mla_token>(id) : -1);
        }
        const nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(mutex_);
        sampler_.observe(tokens.data(), tokens.size());
    }

    mla_token pick(const Logits& logits) {
        sampler_.check_size(logits.size());
        const nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(mutex_);
        return sampler_.pick(logits.data());
    }

    std::tuple<std::vector<mla_token>, std::vector<double>> distribution(const Logits& logits) {
        sampler_.check_size(logits.size());
        const nb::gil_scoped_release release;
        const std::lock_guard<std::mutex> lock(mutex_);
        Sampler::Distribution found = sampler_.distribution(logits.data());
        return {std::move(found.tokens), std::move(found.probabilities)};
    }

  private:
    std::mutex mutex_;
    Sampler sampler_;
};

class PyGeneration {
  public:
    PyGeneration(const PySession& session, const TokenArray& prompt,
                 const SamplingOptions& sampling, const std::vector<mla_token>& end_tokens,
                 size_t max_tokens)
        : generation_(session.session, tokens_of(session.engine(), prompt),
                      options_of(sampling, end_tokens, max_tokens)) {}

    using Made = std::tuple<mla_token, std::optional<const char*>>;

    std::optional<Made> next(Cancellation* cancellation) {
        bool is_more = false;
        Session& session = generation_.session();
        const std::unique_lock<std::recursive_mutex> lock = hold();
        const bool is_long = generation_.result().tokens.empty() &&
                             generation_.prompt_tokens() > session.engine().prefill_chunk();
        try {
            interruptible(is_long, cancellation, [&](Cancellation* cancel) {
                const Claim claim(session);
                is_more = generation_.next(claim, cancel);
            });
        } catch (...) {
            note_result();
            throw;
        }
        note_result();
        if (!is_more) return std::nullopt;
        const GenerationResult& found = generation_.result();
        return Made(found.tokens.back(), name_of(found.finish_reason));
    }

    using Result = std::tuple<size_t, double, double, uint64_t>;

    // As of the last token. Waits for nobody, so that a signal's handler may ask, too.
    Result result() const { return result_; }

  private:
    void note_result() {
        const GenerationResult& found = generation_.result();
        result_ = {found.reused_tokens, found.prefill_ms, found.decode_ms, found.cache_bytes};
    }

    static GenerationOptions options_of(const SamplingOptions& sampling,
                                        const std::vector<mla_token>& end_tokens,
                                        size_t max_tokens) {
        GenerationOptions options;
        options.sampling = sampling;
        options.stop_tokens = end_tokens;  // those of the manifest are among them
        options.ignore_eos = true;
        options.max_tokens = max_tokens;
        return options;
    }

    static std::optional<const char*> name_of(mla_finish_reason reason) {
        switch (reason) {
            case MLA_FINISH_STOP:  // an end token
                return "eos";
            case MLA_FINISH_LENGTH:
                return "length";
            case MLA_FINISH_CONTEXT:
                return "context";
            default:
                return std::nullopt;
        }
    }

    // Without the GIL while waiting: who holds the mutex may need it to get on.
    std::unique_lock<std::recursive_mutex> hold() {
        const nb::gil_scoped_release release;
        return std::unique_lock<std::recursive_mutex>(mutex_);
    }

    std::recursive_mutex mutex_;  // a signal's handler runs within `next`
    Generation generation_;
    Result result_{};  // guarded by the GIL
};

}  // namespace

void bind_generation(nb::module_& m) {
    nb::class_<SamplingOptions>(m, "SamplingOptions", "How the next token is chosen.")
        .def(
            "__init__",
            [](SamplingOptions* self, double temperature, uint32_t top_k, double top_p,
               double min_p, double repetition_penalty, std::optional<uint64_t> seed) {
                SamplingOptions options;
                options.temperature = temperature;
                options.top_k = top_k;
                options.top_p = top_p;
                options.min_p = min_p;
                options.repetition_penalty = repetition_penalty;
                options.seed = seed;
                options.check();
                new (self) SamplingOptions(options);
            },
            "temperature"_a = 0.0, "top_k"_a = 0, "top_p"_a = 1.0, "min_p"_a = 0.0,
            "repetition_penalty"_a = 1.0, "seed"_a.none() = nb::none(),
            "As mla_deploy.runtime.GenerationOptions. Raises UsageError for a value out of range.");

    nb::class_<PySampler>(m, "Sampler", "Picks the tokens of one sequence.")
        .def(nb::init<const SamplingOptions&, uint32_t>(), "options"_a, "vocab_size"_a)
        .def("observe", &PySampler::observe, "ids"_a,
             nb::sig("def observe(self, ids: object) -> None"),
             "Notes tokens of the sequence, for the repetition penalty.")
        .def("pick", &PySampler::pick, "logits"_a, nb::sig("def pick(self, logits: object) -> int"),
             "The next token. logits: float32 [vocab_size].")
        .def("distribution", &PySampler::distribution, "logits"_a,
             nb::sig("def distribution(self, logits: object) -> tuple[list[int], list[float]]"),
             "The tokens that can be picked, and their probabilities.");

    nb::class_<PyGeneration>(m, "Generation", "A generation that is asked for token after token.")
        .def(nb::init<const PySession&, const TokenArray&, const SamplingOptions&,
                      const std::vector<mla_token>&, size_t>(),
             "session"_a, "prompt"_a, "sampling"_a, "end_tokens"_a, "max_tokens"_a,
             nb::sig("def __init__(self, session: Session, prompt: object, "
                     "sampling: SamplingOptions, end_tokens: collections.abc.Sequence[int], "
                     "max_tokens: int) -> "
                     "None"),
             "prompt: int64 [count]. end_tokens: with one of them the text ends.")
        .def("next", &PyGeneration::next, "cancellation"_a.none() = nb::none(),
             nb::sig("def next(self, cancellation: Cancellation | None = None) -> "
                     "tuple[int, typing.Literal['eos', 'length', 'context'] | None] | None"),
             "Makes a token, the first one after computing the prompt; the token, and why it is "
             "the\n"
             "last one if it is. None: it was cancelled, or has ended before.")
        .def("result", &PyGeneration::result,
             "So far: tokens of the prompt found in the cache, milliseconds of prefill and of\n"
             "decoding, bytes of the session's pages.");
}
