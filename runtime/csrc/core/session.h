// A sequence of tokens in the cache. All that happens to it, its engine does.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "core/arena.h"
#include "mla_deploy/runtime.h"

namespace mla::core {

class Claim;
class Engine;

class Session {
  public:
    // Use Engine::session.
    Session(std::shared_ptr<Engine> engine, std::shared_ptr<PageArena> arena)
        : engine_(std::move(engine)), pages_(std::move(arena)) {}

    Engine& engine() const { return *engine_; }

  private:
    friend class Claim;
    friend class Engine;

    const std::shared_ptr<Engine> engine_;
    // The rest is guarded by the engine's mutex.
    PageTable pages_;  // holds room for the tokens, and between steps for no more pages
    std::vector<mla_token> tokens_;
    uint64_t changes_ = 0;  // how often its tokens have changed
    const Claim* claim_ = nullptr;
};

// While it lives, only calls that name it change the session. Errors: MLA_BUSY.
class Claim {
  public:
    explicit Claim(Session& session);
    ~Claim();
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;

  private:
    Session& session_;
};

}  // namespace mla::core
