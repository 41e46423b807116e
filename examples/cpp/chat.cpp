// A conversation on the terminal:  chat BUNDLE LIBONNXRUNTIME [TURN]
//
// TURN is how the model wants a turn written, with {} for what the user says, such as
// "<|User|>{}<|Assistant|>"; docs/embedding.md says how to get it. Without it the model continues
// the text so far. Ctrl-C stops an answer; while none is being written, it ends the program.
#include <pthread.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <mla_deploy/runtime.hpp>
#include <mutex>
#include <thread>

namespace {

// Takes Ctrl-C in a thread of its own: a signal handler may not call the library.
class Interrupt {
  public:
    // To be made before other threads are, which then leave the signal to this one.
    Interrupt() {
        sigemptyset(&signals_);
        sigaddset(&signals_, SIGINT);
        pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
        std::thread([this] { watch(); }).detach();
    }

    // What Ctrl-C is to cancel from now on; null: nothing.
    void set(mla::Cancellation* answer) {
        const std::lock_guard<std::mutex> lock(mutex_);
        answer_ = answer;
    }

  private:
    [[noreturn]] void watch() {
        for (int signal = 0;;) {
            sigwait(&signals_, &signal);
            const std::lock_guard<std::mutex> lock(mutex_);
            if (answer_ == nullptr) std::_Exit(130);
            answer_->request();
        }
    }

    sigset_t signals_;
    std::mutex mutex_;
    mla::Cancellation* answer_ = nullptr;
};

bool print(std::string_view text) {
    std::fwrite(text.data(), 1, text.size(), stdout);
    return std::fflush(stdout) == 0;
}

// Adds a turn and the model's answer to the conversation. The session holds what came before in its
// cache, so only what is new is computed.
void answer(mla::Session& session, const mla::Tokenizer& tokenizer, Interrupt& interrupt,
            std::vector<mla_token>& conversation, const std::string& turn) {
    std::vector<mla_token> prompt = conversation;
    // Special tokens of the turn are found in its text; the first turn may begin with another.
    const auto ids = tokenizer.encode(turn, conversation.empty());
    prompt.insert(prompt.end(), ids.begin(), ids.end());

    mla::TextStream text(tokenizer);
    mla::Cancellation cancellation;
    mla::GenerateOptions options;
    options.cancellation = &cancellation;
    options.on_token = [&](mla_token token) { return print(text.push(token)); };
    interrupt.set(&cancellation);
    mla::Generation made;
    try {
        made = session.generate(prompt, options);
    } catch (...) {
        interrupt.set(nullptr);
        throw;
    }
    interrupt.set(nullptr);
    print(text.flush());
    print("\n");
    if (made.finish_reason == MLA_FINISH_CANCELLED) std::fprintf(stderr, "(stopped)\n");
    std::fprintf(stderr,
                 "(%llu tokens of the prompt, %llu of them cached; %zu tokens in %.0f ms)\n",
                 static_cast<unsigned long long>(made.prompt_tokens),
                 static_cast<unsigned long long>(made.reused_tokens), made.tokens.size(),
                 made.prefill_ms + made.decode_ms);
    conversation = std::move(prompt);
    conversation.insert(conversation.end(), made.tokens.begin(), made.tokens.end());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3 || argc > 4) {
        std::fprintf(stderr, "usage: %s BUNDLE LIBONNXRUNTIME [TURN]\n", argv[0]);
        return 2;
    }
    const std::string turn = argc == 4 ? argv[3] : "{}";
    const auto gap = turn.find("{}");
    if (gap == std::string::npos) {
        std::fprintf(stderr, "TURN has no {} for what the user says: %s\n", turn.c_str());
        return 2;
    }
    static Interrupt interrupt;
    try {
        const std::string bundle = argv[1];
        mla_engine_options options = MLA_ENGINE_OPTIONS_INIT;
        options.bundle = argv[1];
        options.onnxruntime_library = argv[2];
#ifdef MLA_OPS_LIBRARY
        options.ops_library = MLA_OPS_LIBRARY;
#endif
        const mla::Engine engine(options);
        const mla::Tokenizer tokenizer(bundle + "/tokenizer.json");
        mla::Session session = engine.session();
        std::vector<mla_token> conversation;
        for (std::string line; std::fputs("> ", stderr), std::getline(std::cin, line);) {
            try {
                answer(session, tokenizer, interrupt, conversation,
                       std::string(turn).replace(gap, 2, line));
            } catch (const mla::Error& error) {  // such as a full context: the session goes on
                std::fprintf(stderr, "%s\n", error.what());
            }
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
