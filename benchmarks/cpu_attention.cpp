// Times latent attention alone; `cpu_attention.py` builds and runs it and explains the columns.
//
//     cpu_attention ISA FORMAT HEADS RANK ROPE TOKENS THREADS [REPEATS]
//     cpu_attention peak THREADS
//     cpu_attention prefill ISA FORMAT HEADS RANK ROPE PAST NEW THREADS MODE
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "cpu/latent_attention.h"
#include "cpu/thread_pool.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>
#endif

namespace {

using namespace mla::cpu;
using Clock = std::chrono::steady_clock;

// A call's medians. On a shared machine the wall clock counts what others run in between, the CPU
// clock does not (but counts threads that wait); the quickest call lies between.
struct Timing {
    double wall, quickest, cpu;
};

double cpu_clock() {
    timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) + now.tv_nsec * 1e-9;
}

Timing time_calls(int repeats, const std::function<void(int)>& body) {
    std::vector<double> wall, cpu;
    for (int i = 0; i < repeats; ++i) {
        const double cpu_start = cpu_clock();
        const auto start = Clock::now();
        body(i);
        wall.push_back(std::chrono::duration<double>(Clock::now() - start).count());
        cpu.push_back(cpu_clock() - cpu_start);
    }
    std::sort(wall.begin(), wall.end());
    std::sort(cpu.begin(), cpu.end());
    return {wall[wall.size() / 2], wall[0], cpu[cpu.size() / 2]};
}

void check(Status status) {
    if (status == Status::kOk) return;
    std::fprintf(stderr, "%s\n", last_error());
    std::exit(1);
}

void on_threads(ThreadPool& pool, int threads, const std::function<void(int64_t)>& body) {
    const ParallelFor parallel = pool.parallel_for();
    parallel.run(
        parallel.context, threads,
        [](void* argument, int64_t i) {
            (*static_cast<const std::function<void(int64_t)>*>(argument))(i);
        },
        const_cast<std::function<void(int64_t)>*>(&body));
}

// GB/s of reading memory that no L2 holds, all threads together.
double read_bandwidth(ThreadPool& pool, int threads) {
    constexpr size_t kBytes = size_t{256} << 20;
    std::vector<std::vector<uint64_t>> memory(static_cast<size_t>(threads));
    for (auto& part : memory) part.assign(kBytes / threads / 8, 1);
    std::vector<uint64_t> sums(static_cast<size_t>(threads) * 8);
    const double seconds =
        time_calls(7, [&](int) {
            on_threads(pool, threads, [&](int64_t t) {
                const std::vector<uint64_t>& part = memory[static_cast<size_t>(t)];
#if defined(__AVX512VNNI__)
                __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
                for (size_t i = 0; i + 32 <= part.size(); i += 32) {
                    a = _mm512_or_si512(a, _mm512_loadu_si512(&part[i]));
                    b = _mm512_or_si512(b, _mm512_loadu_si512(&part[i + 8]));
                    c = _mm512_or_si512(c, _mm512_loadu_si512(&part[i + 16]));
                    d = _mm512_or_si512(d, _mm512_loadu_si512(&part[i + 24]));
                }
                a = _mm512_or_si512(_mm512_or_si512(a, b), _mm512_or_si512(c, d));
                sums[static_cast<size_t>(t) * 8] +=
                    static_cast<uint64_t>(_mm512_reduce_or_epi64(a));
#else
            uint64_t sum = 0;
            for (const uint64_t x : part) sum |= x;
            sums[static_cast<size_t>(t) * 8] += sum;
#endif
            });
        }).quickest;
    if (sums[0] == 12345) std::puts("");
    return kBytes / seconds * 1e-9;
}

// GB/s of copying such memory: bytes read, those written not counted.
double copy_bandwidth(ThreadPool& pool, int threads) {
    const size_t bytes = (size_t{128} << 20) / threads;
    std::vector<std::vector<char>> from(static_cast<size_t>(threads)), to = from;
    for (auto& part : from) part.assign(bytes, 1);
    for (auto& part : to) part.assign(bytes, 2);
    const double seconds = time_calls(7, [&](int) {
                               on_threads(pool, threads, [&](int64_t t) {
                                   std::memcpy(to[static_cast<size_t>(t)].data(),
                                               from[static_cast<size_t>(t)].data(), bytes);
                               });
                           }).quickest;
    return bytes * threads / seconds * 1e-9;
}

#if defined(__AVX512VNNI__)
double vnni_peak() {  // GOP/s of one thread, two a multiply-add
    constexpr int64_t kRounds = 1000000;
    int32_t sink = 0;
    const double seconds = time_calls(9, [&](int i) {
                               const __m512i x = _mm512_set1_epi8(static_cast<char>(i));
                               __m512i s[12];
#pragma GCC unroll 12
                               for (int j = 0; j < 12; ++j) s[j] = _mm512_set1_epi32(j);
                               for (int64_t k = 0; k < kRounds; ++k)
#pragma GCC unroll 12
                                   for (int j = 0; j < 12; ++j)
                                       s[j] = _mm512_dpbusd_epi32(s[j], x, x);
#pragma GCC unroll 12
                               for (int j = 0; j < 12; ++j) sink += _mm512_reduce_add_epi32(s[j]);
                           }).quickest;
    if (sink == 12345) std::puts("");
    return 12.0 * 64 * 2 * kRounds / seconds * 1e-9;
}
#else
double vnni_peak() { return 0; }
#endif

#if defined(__AMX_INT8__)
double amx_peak() {
    Isa isa;
    if (resolve_isa(Isa::kAmx, &isa) != Status::kOk) return 0;
    struct alignas(64) {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    } config;
    for (int t = 0; t < 8; ++t) config.rows[t] = 16, config.bytes[t] = 64;
    _tile_loadconfig(&config);
    constexpr int64_t kRounds = 200000;
    const double seconds = time_calls(15, [&](int) {
                               for (int64_t i = 0; i < kRounds; ++i) {
                                   _tile_dpbusd(0, 4, 6);
                                   _tile_dpbusd(1, 4, 7);
                                   _tile_dpbusd(2, 5, 6);
                                   _tile_dpbusd(3, 5, 7);
                               }
                           }).quickest;
    _tile_release();
    return 4.0 * 16 * 16 * 64 * 2 * kRounds / seconds * 1e-9;
}
#else
double amx_peak() { return 0; }
#endif

struct Setup {
    AttentionDims dims;
    CacheFormat format = CacheFormat::kInt4;
    int64_t past = 0, fresh = 1, layers = 1, pages = 0;
    std::vector<std::vector<uint8_t>> parts;  // [layers * parts]
    std::vector<float> q, kv, cos, sin, output;
    std::vector<int64_t> table;
    PreparedWeights* weights = nullptr;
    Workspace* workspace = nullptr;
    LatentAttentionParams params;

    void build(WeightPrecision precision) {
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        const auto fill = [&](std::vector<float>& x, size_t count) {
            x.resize(count);
            for (float& value : x) value = normal(random);
        };
        pages = (past + fresh + kPageTokens - 1) / kPageTokens + 1;
        fill(q, static_cast<size_t>(fresh) * dims.heads * (dims.nope + dims.rope));
        fill(kv, static_cast<size_t>(fresh) * (dims.rank + dims.rope));
        fill(cos, static_cast<size_t>(fresh) * dims.rope / 2);
        fill(sin, static_cast<size_t>(fresh) * dims.rope / 2);
        output.resize(static_cast<size_t>(fresh) * dims.heads * dims.v);
        table.resize(static_cast<size_t>(pages - 1));
        for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<int64_t>(i) + 1;
        std::shuffle(table.begin(), table.end(), random);
        PartInfo info[kMaxParts];
        int count = 0;
        check(cache_parts(format, dims.rank, dims.rope, info, &count));
        for (int64_t layer = 0; layer < layers; ++layer)
            for (int p = 0; p < count; ++p) {
                parts.emplace_back(static_cast<size_t>(pages * info[p].page_bytes) + 64);
                auto& part = parts.back();
                if (info[p].element_bytes == 2)  // scales between 0.1 and 0.2, zeros alike
                    for (size_t i = 0; i + 1 < part.size(); i += 2)
                        part[i] = static_cast<uint8_t>(random()), part[i + 1] = 0x2e;
                else
                    for (uint8_t& byte : part) byte = static_cast<uint8_t>(random());
            }
        std::vector<float> w_uk, w_uv;
        fill(w_uk, static_cast<size_t>(dims.heads) * dims.nope * dims.rank);
        fill(w_uv, static_cast<size_t>(dims.heads) * dims.v * dims.rank);
        for (float& w : w_uk) w *= 0.04f;
        WeightsDesc desc;
        desc.dims = dims;
        desc.w_uk = w_uk.data();
        desc.w_uv = w_uv.data();
        desc.precision = precision;
        check(prepare_weights(desc, &weights));
        workspace = create_workspace();
        params.batch = 1;
        params.steps = fresh;
        params.table_pages = pages - 1;
        params.q = q.data();
        params.kv = kv.data();
        params.cos = cos.data();
        params.sin = sin.data();
        params.output = output.data();
        params.weights = weights;
        params.cache.format = format;
        params.cache.pages = pages;
        params.block_table = table.data();
        params.past_lengths = &past;
        params.new_lengths = &fresh;
        params.softmax_scale = 0.05f;
        params.latent_norm_epsilon = 1e-6f;
        params.workspace = workspace;
    }

    const LatentAttentionParams& of_layer(int64_t layer) {
        PartInfo info[kMaxParts];
        int count = 0;
        check(cache_parts(format, dims.rank, dims.rope, info, &count));
        for (int p = 0; p < count; ++p) {
            const auto address = reinterpret_cast<uintptr_t>(
                parts[static_cast<size_t>(layer % layers * count + p)].data());
            params.cache.parts[p] = reinterpret_cast<void*>((address + 63) / 64 * 64);
        }
        return params;
    }
};

CacheFormat format_of(const std::string& name) {
    return name == "int4"   ? CacheFormat::kInt4
           : name == "int8" ? CacheFormat::kInt8
           : name == "fp16" ? CacheFormat::kFp16
                            : CacheFormat::kFp32;
}

}  // namespace

int main(int argc, char** argv) {
    const auto number = [&](int i, int otherwise) {
        return i < argc ? std::atoi(argv[i]) : otherwise;
    };
    const std::string command = argc > 1 ? argv[1] : "";
    if (command == "peak") {
        const int threads = number(2, 1);
        ThreadPool pool(threads);
        std::printf("read_gbs %.2f copy_gbs %.2f vnni_gops %.0f amx_gops %.0f\n",
                    read_bandwidth(pool, threads), copy_bandwidth(pool, threads), vnni_peak(),
                    amx_peak());
        return 0;
    }
    const bool prefill = command == "prefill";
    const int at = prefill ? 2 : 1;
    if (argc < at + 7) {
        std::fprintf(stderr, "usage: see the head of cpu_attention.cpp\n");
        return 2;
    }
    Setup setup;
    check(parse_isa(argv[at], &setup.params.isa));
    setup.format = format_of(argv[at + 1]);
    const int heads = number(at + 2, 16), rank = number(at + 3, 512), rope = number(at + 4, 64);
    setup.dims = {heads, 128, rank, rope, 128};
    setup.past = number(at + 5, 32768) - (prefill ? 0 : 1);
    setup.fresh = prefill ? number(at + 6, 512) : 1;
    const int threads = number(prefill ? at + 7 : at + 6, 1);
    const int repeats = prefill ? 5 : number(at + 7, 24);
    if (prefill && argc > at + 8)
        setup.params.mode = std::string(argv[at + 8]) == "absorbed"   ? AttentionMode::kAbsorbed
                            : std::string(argv[at + 8]) == "expanded" ? AttentionMode::kExpanded
                                                                      : AttentionMode::kAuto;
    setup.layers = prefill ? 1 : 6;  // in turn, so that no L2 holds what is read
    setup.build(WeightPrecision::kBf16);
    ThreadPool pool(threads);
    setup.params.parallel = pool.parallel_for();
    const auto run = [&](int i) { check(latent_attention(setup.of_layer(i))); };
    for (int i = 0; i < (prefill ? 1 : 6); ++i) run(i);
    const Timing call = time_calls(repeats, run);
    const Timing append =
        time_calls(repeats, [&](int i) { check(latent_append(setup.of_layer(i))); });
    std::printf("ms %.4f quickest_ms %.4f cpu_ms %.4f append_us %.2f\n", call.wall * 1e3,
                call.quickest * 1e3, call.cpu * 1e3, append.quickest * 1e6);
    free_weights(setup.weights);
    free_workspace(setup.workspace);
    return 0;
}
