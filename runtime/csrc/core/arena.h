// The memory of the cache: pages of 64 tokens in arrays that all sessions share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "core/manifest.h"
#include "core/memory.h"

namespace mla::core {

// Padded tokens are written there, and block tables are padded with it. Nobody relies on it.
constexpr int64_t kScratchPage = 0;

// Pages, how many sequences use each, and which are free.
//
// A page is the same index in every array. Pages that a fork shares are counted, and copied when
// one of their sequences writes. A page that is handed out again is zeroed first, so that nothing
// one session left (an infinity would survive a masked product) reaches another.
//
// One thread at a time, but for `abandon`, `read` and `write`. Where a device fails, nothing has
// been taken, and the error is the memory's.
class PageArena {
  public:
    // [pages, *part.page_shape], at a cache line.
    struct Array {
        size_t layer;
        CachePart part;
        uint8_t* data;
        size_t bytes;
    };

    // Errors: MLA_OUT_OF_MEMORY.
    PageArena(const std::vector<LayerCache>& cache, uint64_t max_tokens,
              std::shared_ptr<CacheMemory> memory);
    ~PageArena();
    PageArena(const PageArena&) = delete;
    PageArena& operator=(const PageArena&) = delete;

    const std::vector<Array>& arrays() const { return arrays_; }
    CacheMemory& memory() const { return *memory_; }
    int64_t pages() const { return static_cast<int64_t>(users_.size()); }  // with the scratch page
    uint64_t capacity_tokens() const { return (users_.size() - 1) * kPageTokens; }
    size_t page_bytes() const { return page_bytes_; }  // in all arrays

    // Pages that `take` can still hand out.
    uint64_t free_pages();

    // Hands out `count` zeroed pages, each with one user. Nothing, if there are not as many.
    bool take(uint64_t count, std::vector<int64_t>& pages);

    // Counts one more user of each page.
    void share(const std::vector<int64_t>& pages);

    // Counts one user less; a page without users is free.
    void give_back(int64_t page);

    // Gives pages back later, when `free_pages` or `take` is called. Safe in any thread.
    void abandon(std::vector<int64_t> pages) noexcept;

    uint32_t users(int64_t page) const { return users_[static_cast<size_t>(page)]; }
    bool is_shared(int64_t page) const { return users(page) > 1; }

    // Copies a page in all arrays.
    void copy(int64_t from, int64_t to);

    // A page of all arrays, one after another: [page_bytes()].
    void read(int64_t page, uint8_t* host) const;
    void write(int64_t page, const uint8_t* host);

  private:
    uint8_t* at(const Array& array, int64_t page) const {
        return array.data + static_cast<size_t>(page) * array.part.page_bytes();
    }
    void release() noexcept;
    void collect();

    const std::shared_ptr<CacheMemory> memory_;
    std::vector<Array> arrays_;
    size_t page_bytes_ = 0;
    std::vector<uint32_t> users_;  // of each page
    int64_t next_fresh_ = kScratchPage + 1;
    std::vector<int64_t> returned_;
    std::mutex abandoned_mutex_;
    std::vector<int64_t> abandoned_;
};

// The pages of one sequence, in order.
class PageTable {
  public:
    explicit PageTable(std::shared_ptr<PageArena> arena) : arena_(std::move(arena)) {}
    ~PageTable() { arena_->abandon(std::move(pages_)); }
    PageTable(const PageTable&) = delete;
    PageTable& operator=(const PageTable&) = delete;

    const std::vector<int64_t>& pages() const { return pages_; }

    // Room wanted in a table for the tokens from `length` to `new_length`.
    struct Growth {
        PageTable* table;
        uint64_t length;
        uint64_t new_length;
    };

    // Makes room in each table, all of one arena, where a last page that others use too becomes a
    // copy. False: there are not enough pages, and nothing has changed.
    static bool reserve(const std::vector<Growth>& growths);

    // Gives back the pages that `length` tokens do not need.
    void truncate(uint64_t length);

    // Grows to `length` tokens; the pages held now, all full, are copied in turn. False: as
    // `reserve`.
    bool extend_by_copies(uint64_t length);

    // Becomes another table of the same pages. It must be empty.
    void share(const PageTable& other);

    // Bytes of the pages, those shared with other sequences included.
    uint64_t cache_bytes() const { return pages_.size() * arena_->page_bytes(); }

    // Tokens that would find room after the first `length`, if the table were truncated to them.
    uint64_t room(uint64_t length) const;

  private:
    // The page to which token `length` is to be added; null: it begins a page of its own.
    int64_t* page_in_part(uint64_t length);
    void unshare(int64_t& page);

    std::shared_ptr<PageArena> arena_;
    std::vector<int64_t> pages_;
};

}  // namespace mla::core
