// Random numbers: the generator and seeding of numpy.random.default_rng, so that a seed
// draws what numpy draws with it, which the tests hold it against.
#pragma once

#include <cstdint>

namespace mla::core {

// PCG64 XSL-RR (O'Neill, HMC-CS-2014-0905), seeded through numpy's SeedSequence.
class Random {
  public:
    explicit Random(uint64_t seed);

    // Uniform in [0, 1), a multiple of 2^-53.
    double uniform();

  private:
    __extension__ typedef unsigned __int128 Wide;

    uint64_t next();
    void advance();

    Wide state_ = 0;
    Wide increment_ = 0;
};

// A seed from the system.
uint64_t random_seed();

}  // namespace mla::core
