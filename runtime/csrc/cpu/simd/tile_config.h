// The shapes of the eight tile registers, as ldtilecfg reads them.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace mla::cpu {
namespace {

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t columns_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int row_count, int bytes) {
        rows[tile] = static_cast<uint8_t>(row_count);
        columns_bytes[tile] = static_cast<uint16_t>(bytes);
    }
};

}  // namespace
}  // namespace mla::cpu
