// Which two tokens merge, when, and into what: a hash map without pointers.
#pragma once

#include <cstdint>
#include <vector>

namespace mla::text {

struct Merge {
    uint32_t rank;  // the lowest one goes first
    uint32_t into;
};

constexpr uint32_t kNoMerge = UINT32_MAX;

class MergeTable {
  public:
    explicit MergeTable(size_t merges = 0) {
        size_t slots = 16;
        while (slots < 2 * merges) slots *= 2;
        slots_.resize(slots, Slot{kEmpty, {kNoMerge, 0}});
        mask_ = slots - 1;
    }

    // A pair that is given twice keeps the later rank. There must be room.
    void set(uint32_t left, uint32_t right, Merge merge) {
        Slot& slot = slots_[find_slot(key_of(left, right))];
        slot = {key_of(left, right), merge};
    }

    // rank kNoMerge: they do not.
    Merge find(uint32_t left, uint32_t right) const {
        return slots_[find_slot(key_of(left, right))].merge;
    }

  private:
    struct Slot {
        uint64_t key;
        Merge merge;
    };
    static constexpr uint64_t kEmpty = UINT64_MAX;

    static uint64_t key_of(uint32_t left, uint32_t right) { return uint64_t{left} << 32 | right; }
    size_t find_slot(uint64_t key) const {
        const uint64_t mixed = key * 0x9e3779b97f4a7c15u;
        size_t at = (mixed ^ mixed >> 32) & mask_;
        while (slots_[at].key != key && slots_[at].key != kEmpty) at = (at + 1) & mask_;
        return at;
    }

    std::vector<Slot> slots_;
    size_t mask_;
};

}  // namespace mla::text
