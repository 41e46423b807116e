#include "core/arena.h"

#include <algorithm>
#include <limits>
#include <map>
#include <new>

#include "core/error.h"

namespace mla::core {

namespace {

uint64_t pages_for(uint64_t tokens) { return (tokens + kPageTokens - 1) / kPageTokens; }

Error no_memory(uint64_t tokens) {
    return Error(MLA_OUT_OF_MEMORY, "there is not enough memory for the cache")
        .found(tokens, " tokens")
        .next("open the bundle with a smaller max_tokens");
}

}  // namespace

PageArena::PageArena(const std::vector<LayerCache>& cache, uint64_t max_tokens,
                     std::shared_ptr<CacheMemory> memory)
    : memory_(std::move(memory)) {
    for (size_t layer = 0; layer < cache.size(); ++layer) {
        for (const CachePart& part : cache[layer].parts) {
            arrays_.push_back({layer, part, nullptr, 0});
            page_bytes_ += part.page_bytes();
        }
    }
    constexpr uint64_t kLargest = std::numeric_limits<ptrdiff_t>::max();
    // A bound that keeps the products below from overflowing, and pages_for too.
    if (max_tokens > kLargest / 2 || pages_for(max_tokens) + 1 > kLargest / page_bytes_) {
        throw no_memory(max_tokens);
    }
    const auto pages = static_cast<size_t>(pages_for(max_tokens) + 1);  // and the scratch page
    try {
        for (Array& array : arrays_) {
            array.bytes = pages * array.part.page_bytes();
            array.data = memory_->allocate(array.bytes);
            if (array.data == nullptr) throw no_memory(max_tokens);
        }
        users_.resize(pages);
    } catch (const Error&) {
        release();
        throw;
    } catch (const std::exception&) {
        release();
        throw no_memory(max_tokens);
    }
}

PageArena::~PageArena() { release(); }

void PageArena::release() noexcept {
    for (const Array& array : arrays_) {
        if (array.data != nullptr) memory_->release(array.data, array.bytes);
    }
}

uint64_t PageArena::free_pages() {
    collect();
    return returned_.size() + static_cast<uint64_t>(pages() - next_fresh_);
}

bool PageArena::take(uint64_t count, std::vector<int64_t>& pages) {
    if (count > free_pages()) return false;
    pages.reserve(pages.size() + count);  // what is below `finish` cannot fail,
    const size_t touched = static_cast<size_t>(next_fresh_) + count;
    if (returned_.capacity() < touched) returned_.reserve(2 * touched);  // nor can give_back
    const auto again = static_cast<std::ptrdiff_t>(std::min<uint64_t>(count, returned_.size()));
    for (auto page = returned_.end() - again; page != returned_.end(); ++page) {
        for (const Array& array : arrays_) {
            memory_->clear(at(array, *page), array.part.page_bytes());
        }
    }
    if (again > 0) memory_->finish();
    for (uint64_t i = 0; i < count; ++i) {
        int64_t page = next_fresh_;
        if (returned_.empty()) {
            ++next_fresh_;
        } else {  // before fresh ones: its memory is there already
            page = returned_.back();
            returned_.pop_back();
        }
        users_[static_cast<size_t>(page)] = 1;
        pages.push_back(page);
    }
    return true;
}

void PageArena::share(const std::vector<int64_t>& pages) {
    for (const int64_t page : pages) ++users_[static_cast<size_t>(page)];
}

void PageArena::give_back(int64_t page) {
    if (--users_[static_cast<size_t>(page)] == 0) returned_.push_back(page);
}

void PageArena::abandon(std::vector<int64_t> pages) noexcept {
    if (pages.empty()) return;
    const std::lock_guard<std::mutex> lock(abandoned_mutex_);
    try {
        abandoned_.insert(abandoned_.end(), pages.begin(), pages.end());
    } catch (const std::bad_alloc&) {
        // The pages are lost, which is better than the process.
    }
}

void PageArena::copy(int64_t from, int64_t to) {
    for (const Array& array : arrays_) {
        memory_->copy(at(array, to), at(array, from), array.part.page_bytes());
    }
    memory_->finish();
}

void PageArena::read(int64_t page, uint8_t* host) const {
    for (const Array& array : arrays_) {
        memory_->read(host, at(array, page), array.part.page_bytes());
        host += array.part.page_bytes();
    }
}

void PageArena::write(int64_t page, const uint8_t* host) {
    for (const Array& array : arrays_) {
        memory_->write(at(array, page), host, array.part.page_bytes());
        host += array.part.page_bytes();
    }
}

void PageArena::collect() {
    const std::lock_guard<std::mutex> lock(abandoned_mutex_);
    for (const int64_t page : abandoned_) give_back(page);
    abandoned_.clear();
}

bool PageTable::reserve(const std::vector<Growth>& growths) {
    if (growths.empty()) return true;
    PageArena& arena = *growths[0].table->arena_;
    uint64_t needed = 0;
    std::map<int64_t, uint32_t> copies;  // of each shared page; its last user keeps the page itself
    for (const Growth& growth : growths) {
        const uint64_t held = growth.table->pages_.size(), wanted = pages_for(growth.new_length);
        needed += wanted > held ? wanted - held : 0;
        const int64_t* page = growth.table->page_in_part(growth.length);
        if (page != nullptr && copies[*page] + 1 < arena.users(*page)) {
            ++copies[*page];
            ++needed;
        }
    }
    if (needed > arena.free_pages()) return false;
    for (const Growth& growth : growths) {
        PageTable& table = *growth.table;
        if (int64_t* page = table.page_in_part(growth.length)) table.unshare(*page);
        const uint64_t held = table.pages_.size(), wanted = pages_for(growth.new_length);
        if (wanted > held) arena.take(wanted - held, table.pages_);
    }
    return true;
}

int64_t* PageTable::page_in_part(uint64_t length) {
    return length % kPageTokens == 0 ? nullptr : &pages_[length / kPageTokens];
}

void PageTable::unshare(int64_t& page) {
    if (!arena_->is_shared(page)) return;
    std::vector<int64_t> copy;
    arena_->take(1, copy);
    try {
        arena_->copy(page, copy[0]);
    } catch (...) {
        arena_->give_back(copy[0]);
        throw;
    }
    arena_->give_back(page);
    page = copy[0];
}

void PageTable::truncate(uint64_t length) {
    for (const uint64_t keep = pages_for(length); pages_.size() > keep; pages_.pop_back()) {
        arena_->give_back(pages_.back());
    }
}

bool PageTable::extend_by_copies(uint64_t length) {
    const size_t full = pages_.size();
    if (!reserve({{this, full * kPageTokens, length}})) return false;
    try {
        for (size_t i = full; i < pages_.size(); ++i) arena_->copy(pages_[i % full], pages_[i]);
    } catch (...) {
        truncate(full * kPageTokens);
        throw;
    }
    return true;
}

void PageTable::share(const PageTable& other) {
    pages_ = other.pages_;
    arena_->share(pages_);
}

uint64_t PageTable::room(uint64_t length) const {
    const uint64_t kept = pages_for(length);
    const uint64_t slack = kept * kPageTokens - length;
    uint64_t free = arena_->free_pages();
    for (size_t i = kept; i < pages_.size(); ++i) free += !arena_->is_shared(pages_[i]);
    if (slack > 0 && arena_->is_shared(pages_[kept - 1])) {
        if (free == 0) return 0;
        --free;  // for the copy
    }
    return slack + free * kPageTokens;
}

}  // namespace mla::core
