// The matrix unit's tile registers.
#pragma once
#include "simd.h"

namespace halfbyte {
namespace {

#if defined(__AMX_BF16__)

// gcc does not know that these read memory, and moves stores past them.
#define HB_TILE_LOAD(tile, p, stride) do { __asm__ volatile("" ::: "memory"); _tile_loadd(tile, p, stride); } while (0)
#define HB_TILE_CONFIG(p) do { __asm__ volatile("" : : "r"(p) : "memory"); _tile_loadconfig(p); } while (0)

struct TileConfig {  // of all eight registers: rows, and bytes a row
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
    explicit TileConfig(int deep = 16) {  // rows of a weights' register, and words of x's
        for (int i = 0; i < 8; i++) bytes[i] = (uint16_t)(i == 4 || i == 5 ? 4 * deep : 64), rows[i] = (uint8_t)(i < 6 ? 16 : deep);
    }
};

#endif

struct MatrixUnit {  // whatever a thread must set up for it
#if defined(__AMX_BF16__)
    explicit MatrixUnit(int deep = 16) { const TileConfig config(deep ? deep : 16); HB_TILE_CONFIG(&config); }
    ~MatrixUnit() { _tile_release(); }
#else
    explicit MatrixUnit(int = 16) {}
    ~MatrixUnit() {}
#endif
};

}  // namespace
}  // namespace halfbyte
