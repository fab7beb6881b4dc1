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

#if defined(__AMX_BF16__)

// Registers 0 to 3 hold sums, 4 (and 5) x, 6 and 7 weights. gcc's intrinsics take only literal numbers of registers.
template <int T> struct Register;
#define HB_REGISTER(t, weights)                                                                                            \
    template <> struct Register<t> {                                                                                       \
        static void zero() { _tile_zero(t); }                                                                              \
        static void store(void* p) { _tile_stored(t, p, 64); }                                                             \
        static void multiply(const uint8_t* b) { HB_TILE_LOAD(weights, b, 64); _tile_dpbf16ps(t, 4, weights); }            \
        static void multiply_bytes(const uint8_t* b) { HB_TILE_LOAD(weights, b, 64); _tile_dpbsud(t, 4, weights); }        \
    };
HB_REGISTER(0, 6)
HB_REGISTER(1, 7)
HB_REGISTER(2, 6)
HB_REGISTER(3, 7)
#undef HB_REGISTER

#endif

}  // namespace
}  // namespace halfbyte
