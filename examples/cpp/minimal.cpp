// Continues a prompt of token ids:  minimal BUNDLE LIBONNXRUNTIME MAX_TOKENS ID [ID ...]
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <mla_deploy/runtime.hpp>

int main(int argc, char** argv) {
    if (argc < 5) {
        std::fprintf(stderr, "usage: %s BUNDLE LIBONNXRUNTIME MAX_TOKENS ID [ID ...]\n", argv[0]);
        return 2;
    }
    try {
        mla_engine_options options = MLA_ENGINE_OPTIONS_INIT;
        options.bundle = argv[1];
        options.onnxruntime_library = argv[2];
        // Our kernels: CMakeLists.txt sets it where the operator library is installed.
#ifdef MLA_OPS_LIBRARY
        options.ops_library = MLA_OPS_LIBRARY;
#endif
        const mla::Engine engine(options);

        std::vector<mla_token> prompt;
        for (int i = 4; i < argc; ++i) prompt.push_back(std::atoi(argv[i]));

        mla::GenerateOptions generate;
        generate.max_tokens = static_cast<std::uint32_t>(std::atoi(argv[3]));
        generate.on_token = [](mla_token token) {
            std::printf("%d\n", token);
            return std::fflush(stdout) == 0;  // nobody reads any more: stop
        };
        mla::Session session = engine.session();
        const mla::Generation made = session.generate(prompt, generate);

        std::fprintf(stderr, "%zu tokens, prefill %.1f ms, decode %.1f ms, cache %llu bytes\n",
                     made.tokens.size(), made.prefill_ms, made.decode_ms,
                     static_cast<unsigned long long>(made.cache_bytes));
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
