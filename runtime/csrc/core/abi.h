// What the functions of the C ABI have in common.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "core/cancellation.h"
#include "core/engine.h"
#include "core/error.h"
#include "core/handles.h"
#include "core/sampling.h"

namespace mla::core::abi {

// A sampler that several threads may call.
struct SharedSampler {
    std::mutex mutex;
    Sampler sampler;
};

// Never destroyed: threads may outlive main.
Handles<mla_engine, Engine>& engines();
Handles<mla_session, Session>& sessions();
Handles<mla_sampler, SharedSampler>& samplers();
Handles<mla_cancellation, Cancellation>& cancellations();

// Keeps the text for mla_last_error; gives the status.
mla_status remember(mla_status status, const char* text) noexcept;

// Runs the body of a function of the ABI: no exception may reach the caller, which may be C.
template <class Body>
mla_status guarded(const Body& body) noexcept {
    try {
        body();
        return MLA_OK;
    } catch (const Error& error) {
        return remember(error.status(), error.what());
    } catch (const std::bad_alloc&) {
        return remember(MLA_OUT_OF_MEMORY, "there is not enough memory for the call");
    } catch (const std::length_error&) {
        return remember(MLA_OUT_OF_MEMORY, "there is not enough memory for the call");
    } catch (const std::exception& error) {
        return remember(MLA_INTERNAL, error.what());
    } catch (...) {
        return remember(MLA_INTERNAL, "unknown exception");
    }
}

// An argument that must not be null.
template <class T>
T& need(T* pointer, const char* name) {
    if (pointer == nullptr) throw invalid(join(name, " is null")).next("pass its address");
    return *pointer;
}

// An array that may be null only if it is empty.
template <class T>
void need_array(T* pointer, size_t count, const char* name) {
    if (pointer == nullptr && count > 0) {
        throw invalid(join(name, " is null")).found(count, " elements are to be there");
    }
}

std::string text_or_empty(const char* text);

constexpr size_t kLargestStruct = 4096;  // nothing of ours; a larger size was never set

// A copy of a caller's struct, which may be of a program with newer headers.
// older: its size in older headers, where fields were added since; these are zero then.
template <class Struct>
Struct read_struct(const Struct* given, const char* name, size_t older = sizeof(Struct)) {
    static_assert(std::is_trivially_copyable_v<Struct> && offsetof(Struct, struct_size) == 0, "");
    const auto* bytes = reinterpret_cast<const unsigned char*>(&need(given, name));
    size_t size = 0;
    std::memcpy(&size, bytes, sizeof(size));
    if (size != older && (size < sizeof(Struct) || size > kLargestStruct)) {
        throw invalid(join("the struct_size of ", name, " is out of range"))
            .found(size)
            .allowed(sizeof(Struct), " bytes or a little more")
            .next("initialise the struct with its MLA_..._INIT");
    }
    const size_t known = std::min(size, sizeof(Struct));
    if (std::any_of(bytes + known, bytes + size, [](unsigned char b) { return b != 0; })) {
        throw invalid(join(name, " has fields that this library does not know"))
            .found(size, " bytes")
            .allowed(sizeof(Struct), " bytes, and zero beyond")
            .next("use a newer mla-deploy, or leave the new fields at zero");
    }
    Struct copy{};
    std::memcpy(&copy, bytes, known);
    return copy;
}

// Fills a caller's struct, whose size was checked by read_struct; what is beyond `value` is zero.
template <class Struct>
void write_struct(Struct* out, Struct value) {
    std::memcpy(&value.struct_size, out, sizeof(value.struct_size));
    std::memcpy(out, &value, sizeof(Struct));
}

// As many of `values` as fit; `count` is set to how many there are.
template <class T>
void write_array(const std::vector<T>& values, T* out, size_t capacity) {
    need_array(out, capacity, "the place for the result");
    std::copy_n(values.begin(), std::min(capacity, values.size()), out);
}

SamplingOptions read_sampling(const mla_sampling_options* given);

// The object of a handle that may be null.
std::shared_ptr<Cancellation> optional_cancellation(mla_cancellation* handle);

}  // namespace mla::core::abi
