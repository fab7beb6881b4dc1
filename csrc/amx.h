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

// All rows of x at once: the unit takes sixteen for the price of one, so that decoding to bfloat16 is what remains.
// N tiles of the matrix side by side, since each sum waits long for its last. FULL: all have 16 rows.
template <Pairing P, int N, bool FULL>
struct SmallAmx {
    static constexpr int64_t BUFFER = 2048, ROOM = 32 * 64;  // bytes: decoded codes of a step of a tile; x with zeros around
    static constexpr int64_t SUMS_AT = 8 * BUFFER, ROOM_AT = SUMS_AT + 4 * 1024, SCRATCH = ROOM_AT + 4 * ROOM;

    const Small& s;
    const Matrix& m;
    const Pairs<P> pairs;
    int n[N];  // rows of the tiles
    float* sums;
    uint8_t* room;

    SmallAmx(const Small& s, int64_t t, uint8_t* scratch) : s(s), m(*s.m), pairs(s.table), sums((float*)(scratch + SUMS_AT)), room(scratch + ROOM_AT) {
        for (int i = 0; i < N; i++) n[i] = m.tile_rows(t + i);
    }

    // 32 neighbours of a tile's rows, in 16 rows of pairs
    template <int T> const uint8_t* decode(const uint8_t* from, uint8_t* b, int64_t ahead) const {
        if constexpr (T < N) {
            const int rows = FULL ? TILE : n[T];
            for (int w = 0; w < pairs.bits; w++, from += 4 * rows) {
                __builtin_prefetch(from + ahead);
                pairs.each(FULL ? V::words(from) : V::words(from, rows), [&](auto at, I codes) {
                    constexpr int k = decltype(at)::value;
                    // the halves of 8-bit codes go to registers of their own
                    uint8_t* to = P == INT8 ? b + 1024 * (k % 2) + 64 * (2 * w + k / 2) : b + 64 * (4 * w + k);
                    _mm512_store_si512(to, codes);
                });
            }
        }
        return from;
    }
    template <int T> void multiply(const uint8_t* b) const {
        if constexpr (T < N) {
            Register<T>::multiply(b);
            if constexpr (P == INT8) Register<T>::multiply(b + 1024);
        }
    }
    // Copies x's 32 columns of this step between 16 rows of zeros above and below; gives the first.
    const uint8_t* place_x(int64_t step) const {
        uint8_t* to = room + (step & 3) * ROOM + 15 * 64;
        for (int r = 0; r < s.rows; r++) _mm512_store_si512(to + 64 * r, _mm512_loadu_si512(s.x16 + r * m.cols + 32 * step));
        return to;
    }
    // Adds up `count` groups from g, whose sums stood one below the other in tile T's register.
    template <int T> void add(int64_t g, int64_t count, const float* scale, const float* shift, F* total, const uint8_t* warm) const {
        if constexpr (T < N) {
            const float* c = sums + T * 256;
            total += T * s.rows, scale += (T * m.groups + g) * TILE, shift += (T * m.groups + g) * TILE;
            const float *base = s.base ? s.base + g : nullptr, *x_sums = s.sums ? s.sums + g : nullptr;
            for (int r = 0; r < s.rows; r++) {
                F sum = total[r];
                for (int64_t i = 0; i < count; i++) {
                    __builtin_prefetch(warm + 64 * i);
                    F f = V::load(c + (i * s.rows + r) * TILE);
                    if (base) f = V::add(f, V::set1(base[r * m.groups + i]));
                    sum = V::fma(V::load(scale + i * TILE), f, sum);
                    if (x_sums) sum = V::fma(V::load(shift + i * TILE), V::set1(x_sums[r * m.groups + i]), sum);
                }
                total[r] = sum;
            }
        }
    }
    template <int T> void take() const {
        if constexpr (T < N) Register<T>::store(sums + T * 256);
        Register<T>::zero();
    }
    // scale, shift: [N][groups][16]
    void run(int64_t t, const float* scale, const float* shift, uint8_t* buffer) const {
        F total[N * 8];
        for (int i = 0; i < N * s.rows; i++) total[i] = V::zero();
        const uint8_t *p0 = m.tile(t), *p1 = m.tile(t + 1 % N), *p2 = m.tile(t + 2 % N), *p3 = m.tile(t + 3 % N);
        // What is decoded is multiplied a step later: loading a register while its stores are still on their way waits.
        // Register 4 holds x in the rows of the present group, and zeros in all others: several groups are summed apart
        // in one register before it is read.
        const int64_t steps = m.cols / 32, per_group = m.group / 32, slots = 16 / s.rows;
        int64_t slot = 0, in_group = 0, done = 0, waiting = 0;
        const auto add_waiting = [&] {
            add<0>(done, waiting, scale, shift, total, p0 + AHEAD), add<1>(done, waiting, scale, shift, total, p1 + AHEAD);
            add<2>(done, waiting, scale, shift, total, p2 + AHEAD), add<3>(done, waiting, scale, shift, total, p3 + AHEAD);
            done += waiting, waiting = 0;
        };
        const auto after = [&](bool last) {  // a step was multiplied. Sums are read a step after they were stored, too
            if (waiting) add_waiting();
            if (++in_group < per_group) return;
            in_group = 0;
            if (++slot < slots && !last) return;
            take<0>(), take<1>(), take<2>(), take<3>();
            waiting = slot, slot = 0;
        };
        Register<0>::zero(), Register<1>::zero(), Register<2>::zero(), Register<3>::zero();
        const uint8_t* x = place_x(0);
        uint8_t *now = buffer, *next = buffer + 4 * BUFFER;
        p0 = decode<0>(p0, now, 0), p1 = decode<1>(p1, now + BUFFER, 0), p2 = decode<2>(p2, now + 2 * BUFFER, 0), p3 = decode<3>(p3, now + 3 * BUFFER, 0);
        const int64_t near_end = steps - AHEAD / (64 * pairs.bits);
        for (int64_t step = 1; step < steps; step++) {
            // each tile's own next bytes, and near its end the first ones of the tile N further on
            const int64_t ahead = AHEAD + (step < near_end ? 0 : (N - 1) * TILE * m.row_bytes());
            const uint8_t* next_x = place_x(step);
            HB_TILE_LOAD(4, x - 64 * slot * s.rows, 64);
            multiply<0>(now), p0 = decode<0>(p0, next, ahead);
            multiply<1>(now + BUFFER), p1 = decode<1>(p1, next + BUFFER, ahead);
            multiply<2>(now + 2 * BUFFER), p2 = decode<2>(p2, next + 2 * BUFFER, ahead);
            multiply<3>(now + 3 * BUFFER), p3 = decode<3>(p3, next + 3 * BUFFER, ahead);
            x = next_x;
            uint8_t* const swap = now;
            now = next, next = swap;
            after(false);
        }
        HB_TILE_LOAD(4, x - 64 * slot * s.rows, 64);
        multiply<0>(now), multiply<1>(now + BUFFER), multiply<2>(now + 2 * BUFFER), multiply<3>(now + 3 * BUFFER);
        after(true);
        add_waiting();
        for (int i = 0; i < N; i++) for (int r = 0; r < s.rows; r++) finish(s, t + i, r, total[i * s.rows + r]);
    }
};

#endif

}  // namespace
}  // namespace halfbyte
