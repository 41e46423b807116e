#include "core/random.h"

#include <array>
#include <cstddef>
#include <random>

namespace mla::core {

namespace {

constexpr int kPool = 4;

// One of SeedSequence's two hashes: its constant changes with every value.
class Hash {
  public:
    Hash(uint32_t constant, uint32_t multiplier) : constant_(constant), multiplier_(multiplier) {}

    uint32_t operator()(uint32_t value) {
        value ^= constant_;
        constant_ *= multiplier_;
        value *= constant_;
        return value ^ (value >> 16);
    }

  private:
    uint32_t constant_;
    uint32_t multiplier_;
};

uint32_t mix(uint32_t x, uint32_t y) {
    const uint32_t mixed = 0xca01f9ddu * x - 0x4973f715u * y;
    return mixed ^ (mixed >> 16);
}

// SeedSequence(seed).generate_state(4, uint64)
std::array<uint64_t, 4> seed_state(uint64_t seed) {
    // The words that the seed has not count as zero.
    const uint32_t words[kPool] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    uint32_t pool[kPool];
    Hash into_pool(0x43b0d7e5, 0x931e8875);
    for (int i = 0; i < kPool; ++i) pool[i] = into_pool(words[i]);
    for (int from = 0; from < kPool; ++from) {
        for (int to = 0; to < kPool; ++to) {
            if (from != to) pool[to] = mix(pool[to], into_pool(pool[from]));
        }
    }
    std::array<uint64_t, 4> state{};
    Hash out_of_pool(0x8b51f9dd, 0x58f38ded);
    for (size_t i = 0; i < 2 * state.size(); ++i) {
        state[i / 2] |= uint64_t{out_of_pool(pool[i % kPool])} << (32 * (i % 2));
    }
    return state;
}

}  // namespace

Random::Random(uint64_t seed) {
    const auto words = seed_state(seed);
    const Wide start = Wide{words[0]} << 64 | words[1];
    increment_ = (Wide{words[2]} << 64 | words[3]) << 1 | 1;
    advance();
    state_ += start;
    advance();
}

double Random::uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

uint64_t Random::next() {
    advance();
    const auto folded = static_cast<uint64_t>(state_ >> 64) ^ static_cast<uint64_t>(state_);
    const auto turn = static_cast<unsigned>(state_ >> 122);
    return folded >> turn | folded << (-turn & 63);
}

void Random::advance() {
    constexpr Wide kMultiplier = Wide{0x2360ed051fc65da4} << 64 | 0x4385df649fccf645;
    state_ = state_ * kMultiplier + increment_;
}

uint64_t random_seed() {
    std::random_device device;
    return uint64_t{device()} << 32 | device();
}

}  // namespace mla::core
