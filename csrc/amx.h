// The matrix unit's tile registers, and products with few rows on it.
#pragma once
#include "isa.h"
#include "pairs.h"
#include "scales.h"

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

// Sums T (0 to 3), each with a register for its weights. gcc's intrinsics take only literal numbers of registers.
template <int T> struct Register;
#define HB_REGISTER(t, weights)                                                                     \
    template <> struct Register<t> {                                                                \
        static void zero() { _tile_zero(t); }                                                       \
        static void store(float* p) { _tile_stored(t, p, 64); }                                     \
        static void multiply(const uint8_t* b) { HB_TILE_LOAD(weights, b, 64); _tile_dpbf16ps(t, 4, weights); } \
    };
HB_REGISTER(0, 5)
HB_REGISTER(1, 6)
HB_REGISTER(2, 7)
HB_REGISTER(3, 5)
#undef HB_REGISTER

// All rows of x at once: the unit takes sixteen for the price of one, so that decoding to bfloat16 is what remains.
// N tiles of the matrix side by side, since each sum waits long for its last.
template <Pairing P, int N>
struct SmallAmx {
    const Small& s;
    const Matrix& m;
    const Pairs<P> pairs;
    const uint8_t* p[N];
    int n[N];
    uint8_t* buffer;  // what is decoded, in turns, so that storing one and loading the last overlap
    float* sums;
    uint8_t* room;                  // zeros but for x's rows in the middle, in turns as well
    const uint8_t* before = nullptr;  // where x stands there for the step that is multiplied next

    static constexpr int64_t room_bytes = 32 * 64, room_at = 8 * 2048 + 4 * 1024, scratch_bytes = room_at + 4 * room_bytes;

    SmallAmx(const Small& s, int64_t t, uint8_t* scratch) : s(s), m(*s.m), pairs(s.table), buffer(scratch), sums((float*)(scratch + 8 * 2048)), room(scratch + room_at) {
        for (int i = 0; i < N; i++) p[i] = m.tile(t + i), n[i] = m.tile_rows(t + i);
    }

    template <int T> void decode(uint8_t* b, int64_t ahead) {  // 32 neighbours of tile T's rows
        if constexpr (T < N) {
            const uint8_t* from = p[T];
            const int rows = n[T];
            for (int w = 0; w < pairs.bits; w++, from += 4 * rows) {
                __builtin_prefetch(from + ahead);
                pairs.each(__builtin_expect(rows == TILE, 1) ? V::words(from) : V::words(from, rows), [&](auto at, I codes) {
                    constexpr int k = decltype(at)::value;
                    // row r of a register's sixteen holds pair r; the halves of 8-bit codes go to registers of their own
                    uint8_t* to = P == INT8 ? b + 1024 * (k % 2) + 64 * (2 * w + k / 2) : b + 64 * (4 * w + k);
                    _mm512_store_si512(to, codes);
                });
            }
            p[T] = from;
        }
    }
    // Copies x's 32 columns of this step between 16 rows of zeros above and below; gives the first.
    const uint8_t* place_x(int64_t step) {
        uint8_t* to = room + (step & 3) * room_bytes + 15 * 64;
        for (int r = 0; r < s.rows; r++) _mm512_store_si512(to + 64 * r, _mm512_loadu_si512(s.x16 + r * m.cols + 32 * step));
        return to;
    }
    template <int T> void multiply(const uint8_t* b) {
        if constexpr (T < N) {
            Register<T>::multiply(b);
            if constexpr (P == INT8) Register<T>::multiply(b + 1024);
        }
    }
    // Adds up `count` groups from g, whose sums stand one below the other in the tile register.
    template <int T> void add(int64_t g, int64_t count, const float* scale, const float* shift, F* total) {
        if constexpr (T < N) {
            float* c = sums + T * 256;
            Register<T>::store(c);
            total += T * s.rows, scale += T * m.groups * TILE, shift += T * m.groups * TILE;
            for (int64_t i = 0; i < count; i++, g++) {
                for (int r = 0; r < s.rows; r++, c += TILE) {
                    F sum = V::load(c);
                    if (s.base) sum = V::add(sum, V::set1(s.base[r * m.groups + g]));
                    total[r] = V::fma(V::load(scale + g * TILE), sum, total[r]);
                    if (s.sums) total[r] = V::fma(V::load(shift + g * TILE), V::set1(s.sums[r * m.groups + g]), total[r]);
                }
            }
        }
    }
    // scale, shift: [N][groups][16]
    void run(int64_t t, const float* scale, const float* shift) {
        F total[N * 8];
        for (int i = 0; i < N * s.rows; i++) total[i] = V::zero();
        // What is decoded is multiplied a step later: loading a register while its stores are still on their way waits.
        // Register 4 holds x in the rows of the present group, and zeros in all others: several groups are summed apart
        // in one register before it is read.
        constexpr int64_t step_bytes = 64 * Pairs<P>::bits;
        const int64_t steps = m.cols / 32, per_group = m.group / 32, slots = 16 / s.rows;
        int64_t slot = 0, in_group = 0, done = 0;
        Register<0>::zero(), Register<1>::zero(), Register<2>::zero(), Register<3>::zero();
        for (int64_t step = 0; step <= steps; step++) {
            uint8_t *now = buffer + (step & 1) * 4 * 2048, *last = buffer + (~step & 1) * 4 * 2048;
            const uint8_t* x = nullptr;
            // each tile's own next bytes, and near its end the first ones of the tile N further on
            const int64_t ahead = AHEAD + (step + AHEAD / step_bytes < steps ? 0 : (N - 1) * TILE * m.row_bytes());
            if (step < steps) x = place_x(step);
            if (step) HB_TILE_LOAD(4, before - 64 * slot * s.rows, 64);
            if (step) multiply<0>(last);
            if (step < steps) decode<0>(now, ahead);
            if (step) multiply<1>(last + 2048);
            if (step < steps) decode<1>(now + 2048, ahead);
            if (step) multiply<2>(last + 4096);
            if (step < steps) decode<2>(now + 4096, ahead);
            if (step) multiply<3>(last + 6144);
            if (step < steps) decode<3>(now + 6144, ahead);
            before = x;
            if (step == 0 || ++in_group < per_group) continue;
            in_group = 0;
            if (++slot < slots && step < steps) continue;
            add<0>(done, slot, scale, shift, total), add<1>(done, slot, scale, shift, total);
            add<2>(done, slot, scale, shift, total), add<3>(done, slot, scale, shift, total);
            done += slot, slot = 0;
            Register<0>::zero(), Register<1>::zero(), Register<2>::zero(), Register<3>::zero();
        }
        for (int i = 0; i < N; i++) for (int r = 0; r < s.rows; r++) finish(s, t + i, r, total[i * s.rows + r]);
    }
};

#endif

}  // namespace
}  // namespace halfbyte
