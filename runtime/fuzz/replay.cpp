// Runs a fuzz target without libFuzzer, on seeds and on mutations of them:
//
//     fuzz_... MUTATIONS SEED_OF_RANDOM_NUMBERS FILE [FILE ...]
//
// An input that it dies of is left in fuzz-last-input.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

using Random = std::mt19937;

size_t below(Random& random, size_t end) { return end > 0 ? random() % end : 0; }

// Bytes change, vanish, or come from another place of a seed.
std::string mutate(std::string bytes, const std::string& other, Random& random) {
    for (size_t n = 1 + below(random, 4); n > 0; --n) {
        const size_t at = below(random, bytes.size());
        const size_t length = 1 + below(random, 24);
        switch (below(random, 5)) {
            case 0:
                if (!bytes.empty()) bytes[at] = static_cast<char>(random());
                break;
            case 1:
                bytes.erase(at, length);
                break;
            case 2:
                bytes.insert(at, other.substr(below(random, other.size()), length));
                break;
            case 3:
                bytes.replace(at, length, other.substr(below(random, other.size()), length));
                break;
            default:
                if (below(random, 8) == 0) bytes.resize(at);
        }
    }
    return bytes;
}

void run(const std::string& bytes) {
    std::ofstream("fuzz-last-input", std::ios::binary) << bytes;
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "usage: %s MUTATIONS SEED FILE [FILE ...]\n", argv[0]);
        return 2;
    }
    std::vector<std::string> seeds;
    for (int i = 3; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        run(seeds.back());
    }
    Random random(static_cast<unsigned>(std::atoi(argv[2])));
    const long mutations = std::atol(argv[1]);
    for (long i = 0; i < mutations; ++i) {
        const std::string& seed = seeds[below(random, seeds.size())];
        run(mutate(seed, seeds[below(random, seeds.size())], random));
    }
    std::remove("fuzz-last-input");
    std::printf("%zu seeds and %ld mutations\n", seeds.size(), mutations);
    return 0;
}
