// Threads that share an engine, sessions, tokenizers and cancellations in every way that runtime.h
// allows, for ThreadSanitizer:  concurrent_sessions BUNDLE LIBONNXRUNTIME FOLDER
//
// Checks what can be checked on the way: tokens of a thread's own sessions do not depend on what
// the other threads do.
#include <atomic>
#include <cstdio>
#include <mla_deploy/runtime.hpp>
#include <string>
#include <thread>

namespace {

constexpr int kThreads = 4;
constexpr int kRounds = 6;

std::atomic<int> failures{0};

void expect(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "failed: %s\n", what);
    ++failures;
}

// Whether the call fails in one of the ways that concurrent use of a session may lead to.
template <class Call>
void attempt(const Call& call) {
    try {
        call();
    } catch (const mla::Error& error) {
        const bool allowed = error.status() == MLA_BUSY || error.status() == MLA_INVALID_HANDLE ||
                             error.status() == MLA_CACHE_FULL ||
                             error.status() == MLA_INVALID_ARGUMENT;  // a rewind that came too late
        expect(allowed, error.what());
    }
}

std::vector<mla_token> prompt_of(int thread) {
    std::vector<mla_token> prompt;
    for (int i = 0; i < 70 + thread; ++i) prompt.push_back((7 * thread + i) % 200);
    return prompt;
}

mla::GenerateOptions ten_tokens() {
    mla::GenerateOptions options;
    options.max_tokens = 10;
    options.ignore_eos = true;
    return options;
}

// A thread's own sessions: made, forked, saved, loaded, rewound.
void own(const mla::Engine& engine, int thread, const std::string& folder,
         const std::vector<mla_token>& expected) {
    const std::string path = folder + "/session" + std::to_string(thread);
    for (int round = 0; round < kRounds; ++round) {
        mla::Session session = engine.session();
        const auto made = session.generate(prompt_of(thread), ten_tokens());
        expect(made.tokens == expected, "a generation among others");
        mla::Session fork = session.fork();
        session.rewind(60);
        fork.save(path);
        mla::Session loaded = engine.load(path);
        expect(fork.decode(1) == loaded.decode(1), "a loaded session");
        expect(session.generate(prompt_of(thread), ten_tokens()).tokens == expected,
               "a rewound one");
    }
}

// One session of all threads.
void shared(mla::Session& session, int thread) {
    for (int round = 0; round < kRounds; ++round) {
        attempt([&] { session.prefill({1, 2, 3}); });
        attempt([&] { session.generate(prompt_of(thread), ten_tokens()); });
        attempt([&] { session.fork().decode(5); });
        attempt([&] { session.rewind(session.length() / 2); });
        attempt([&] { session.tokens(); });
    }
}

// A generation that another thread cancels.
void cancelled(const mla::Engine& engine) {
    for (int round = 0; round < kRounds; ++round) {
        mla::Cancellation cancellation;
        mla::GenerateOptions options = ten_tokens();
        options.max_tokens = 200;
        options.cancellation = &cancellation;
        std::atomic<bool> begun{false};
        options.on_token = [&](mla_token) { return begun = true; };
        std::thread canceller([&] {
            while (!begun) std::this_thread::yield();
            cancellation.request();
        });
        mla::Session session = engine.session();
        const auto made = session.generate({1, 2, 3}, options);
        canceller.join();
        expect(made.finish_reason == MLA_FINISH_CANCELLED || made.tokens.size() == 200, "an end");
    }
}

// Handles closed under the hands of another thread.
void closed(const mla::Engine& engine) {
    for (int round = 0; round < kRounds; ++round) {
        mla::Session session = engine.session();
        mla_session* const handle = session.get();
        std::thread user([&] {
            for (mla_token token = 0; token < 20; ++token) {
                const mla_status status = mla_session_decode(handle, token, nullptr, 0);
                expect(status == MLA_OK || status == MLA_INVALID_HANDLE, "a closed session");
            }
        });
        session = engine.session();
        user.join();
    }
}

// A tokenizer and a stream of all threads; streams of their own, one of them fed by a generation.
void text(const mla::Engine& engine, const mla::Tokenizer& tokenizer, mla::TextStream& common,
          int thread) {
    for (int round = 0; round < kRounds; ++round) {
        const std::string words = "the others in their thin tea " + std::to_string(thread);
        mla::TextStream stream(tokenizer);
        std::string joined;
        for (const mla_token id : tokenizer.encode(words)) {
            joined += stream.push(id);
            common.push(id);
        }
        joined += stream.flush();
        expect(joined == words, "a stream among others");

        joined.clear();
        mla::GenerateOptions options = ten_tokens();
        options.on_token = [&](mla_token id) {
            joined += stream.push(id);
            return true;
        };
        const auto made = engine.session().generate(prompt_of(thread), options);
        joined += stream.flush();
        expect(joined == tokenizer.decode(made.tokens), "the stream of a generation");
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    mla_engine_options options = MLA_ENGINE_OPTIONS_INIT;
    options.bundle = argv[1];
    options.onnxruntime_library = argv[2];
    options.max_tokens = 64 * 100;
    options.prefill_chunk = 32;
    options.threads = 1;
    const std::string folder = argv[3];

    auto engine = std::make_unique<mla::Engine>(options);
    std::vector<std::vector<mla_token>> expected;
    for (int i = 0; i < kThreads; ++i) {
        expected.push_back(engine->session().generate(prompt_of(i), ten_tokens()).tokens);
    }
    mla::Session common = engine->session();
    const mla::Tokenizer tokenizer(std::string(argv[1]) + "/tokenizer.json");
    mla::TextStream common_stream(tokenizer);
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
        threads.emplace_back([&, i] { own(*engine, i, folder, expected[i]); });
        threads.emplace_back([&, i] { shared(common, i); });
        threads.emplace_back([&, i] { text(*engine, tokenizer, common_stream, i); });
    }
    threads.emplace_back([&] { cancelled(*engine); });
    threads.emplace_back([&] { closed(*engine); });
    for (std::thread& thread : threads) thread.join();

    common.rewind(0);
    const mla_engine_info info = engine->info();
    expect(info.free_tokens == info.capacity_tokens, "every page came back");
    engine.reset();
    expect(common.decode(1).size() == info.vocab_size, "a session outlives its engine's handle");
    if (failures == 0) std::puts("no failure");
    return failures == 0 ? 0 : 1;
}
