// Many rows of x: matrix products in bfloat16, for which a block of the matrix is decoded into the cache and used for all
// rows. Bound by arithmetic.
//
// y (rows, out) = A B, in both directions: A is x or dy, B the matrix, decoded with its rows as columns, or as it stands.
// A's blocks are 16 rows of 32 neighbours: where x lies, or packed. B's are 16 pairs of 16 columns, a KB. So a block is a
// tile register, and a row of it a vector register.
#pragma once
#include "amx.h"
#include "decode.h"
#include "isa.h"
#include "scales.h"

#if defined(__AVX512BF16__)

namespace halfbyte {
namespace {

constexpr int64_t BLOCK = 512;  // bfloat16 values of a block: 16 x 32
// How much of the matrix is decoded at a time: BESIDE columns of B that are DEEP where the product sums, or more columns
// where they are less deep.
constexpr int64_t BESIDE = 256, DEEP = 1024;

inline I two_rows(F low, F high) {  // 32 neighbours
    return (I)_mm512_cvtne2ps_pbh(high, low);
}
inline I interleaved(F even, F odd) {  // pairs of 16 columns
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), two_rows(even, odd));
}

// A tile's values by word: its codes from column k on, with the scales of their groups.
template <int BITS>
struct Words {
    static constexpr int CODES = 32 / BITS;
    const Decode& d;
    const uint8_t* p;
    int n;                  // the tile's rows
    int64_t group, until = 0;  // columns before `until` share what follows
    const float *scale, *zero;
    F s = V::zero(), z = V::zero();

    // Scales of the groups of [k, end) take part of `room`, which has place for scales_size() floats.
    Words(const Decode& d, int64_t t, int64_t k, int64_t end, float* room) : d(d), p(d.m.tile(t) + k / CODES * 4 * d.m.tile_rows(t)), n(d.m.tile_rows(t)), group(d.m.group) {
        const Matrix& m = d.m;
        const int64_t first = k / group / 8 * 8, after = ceil_div(end, group);
        tile_values(m.scale, t * TILE, n, m.groups, first, after, room);
        scale = room - first * TILE, zero = nullptr;
        if (!m.has_zero()) return;
        tile_values(m.zero, t * TILE, n, m.groups, first, after, room + (after - first) * TILE);
        zero = scale + (after - first) * TILE;
    }
    // Values of columns [k, k + CODES), the next ones.
    template <class Each> void next(int64_t k, Each each) {
        if (k >= until) {
            const int64_t g = k / group;
            s = V::load(scale + g * TILE);
            if (zero) z = V::load(zero + g * TILE);
            until = (g + 1) * group;
        }
        prefetch(p);
        const I v = n == TILE ? V::words(p) : V::words(p, n);
        p += 4 * n;
        if constexpr (BITS == 4) d.word4(v, s, z, each);
        else d.word8(v, s, z, each);
    }
};
inline int64_t scales_size(const Matrix& m) { return 2 * (m.groups + 8) * TILE; }

// The matrix's columns [k0, k1) as B's depth and its rows [n0, n1) as B's columns, `next` values from 16 to the next 16.
template <int BITS>
void decode_rows(const Decode& d, int64_t k0, int64_t k1, int64_t n0, int64_t n1, int64_t next, uint16_t* panel) {
    constexpr int CODES = 32 / BITS;
    float* room = (float*)scratch(0, (size_t)scales_size(d.m) * 4);
    for (int64_t t = n0 / TILE; t < ceil_div(n1, TILE); t++, panel += next) {
        Words<BITS> words(d, t, k0, k1, room);
        uint16_t* out = panel;
        int64_t k = k0;
        for (; k < k1; k += CODES, out += 16 * CODES) {
            F f[CODES];
            words.next(k, [&](auto at, F value) { f[decltype(at)::value] = value; });
            for (int i = 0; i < CODES; i += 2) _mm512_storeu_si512(out + 16 * i, interleaved(f[i], f[i + 1]));
        }
        for (; k % 32; k += CODES, out += 16 * CODES) memset(out, 0, 32 * CODES);
    }
}

// The same with the matrix's rows [k0, k1) as depth and its columns [n0, n1) as columns; k0 and n0 begin blocks.
template <int BITS>
void decode_columns(const Decode& d, int64_t k0, int64_t k1, int64_t n0, int64_t n1, int64_t next, uint16_t* panel) {
    constexpr int CODES = 32 / BITS;
    const Matrix& m = d.m;
    float *room = (float*)scratch(0, (size_t)(2 * scales_size(m)) * 4), *more = room + scales_size(m);
    for (int64_t t = k0 / TILE; t < ceil_div(k1, TILE); t += 2, panel += BLOCK) {
        const bool two = t + 1 < m.tiles();
        Words<BITS> low(d, t, n0, n1, room), high(d, two ? t + 1 : t, n0, n1, more);
        uint16_t* out = panel;
        for (int64_t n = n0; n < n1; n += 16, out += next) {
            I pairs[16];
#pragma GCC unroll 4
            for (int i = 0; i < 16; i += CODES) {
                if (n + i >= n1) {
                    for (int j = 0; j < CODES; j++) pairs[i + j] = _mm512_setzero_si512();
                    continue;
                }
                F f[CODES];
                low.next(n + i, [&](auto at, F value) { f[decltype(at)::value] = value; });
                high.next(n + i, [&](auto at, F value) {
                    constexpr int j = decltype(at)::value;
                    pairs[i + j] = two_rows(f[j], two ? value : V::zero());
                });
            }
            transpose(pairs);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + 32 * i, pairs[i]);
        }
    }
}

// Rows [16 i, 16 i + 16) of x (rows, cols) as A blocks; zeros where there are no more.
inline void pack_rows(const uint16_t* x, int64_t rows, int64_t cols, int64_t i, uint16_t* out) {
    for (int64_t k = 0; k < cols; k += 32, out += BLOCK) {
        const __mmask32 some = cols - k >= 32 ? ~0u : (1u << (cols - k)) - 1;
        for (int64_t r = 0; r < 16; r++) {
            const bool there = 16 * i + r < rows;
            _mm512_storeu_si512(out + 32 * r, there ? _mm512_maskz_loadu_epi16(some, x + (16 * i + r) * cols + k) : _mm512_setzero_si512());
        }
    }
}

struct A {  // where its blocks lie: values from a row to the next, and from a block to the next below and beside it
    const uint16_t* p;
    int64_t row, below, beside;
    A at(int64_t block, int64_t step) const { return {p + block * below + step * beside, row, below, beside}; }
};

// C (16 R rows, 16 S columns; ldc) = or += the sum over `steps` of A block [r][step] times B block [s][step].
template <int R, int S>
void multiply(A a, const uint16_t* b, int64_t b_next, int64_t steps, float* c, int64_t ldc, bool first) {
#if defined(__AMX_BF16__)
    float *c00 = c, *c01 = c + 16, *c10 = c + 16 * ldc, *c11 = c10 + 16;
    const int64_t stride = ldc * 4, a_stride = a.row * 2;
    if (first) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        HB_TILE_LOAD(0, c00, stride);
        if constexpr (S > 1) HB_TILE_LOAD(1, c01, stride);
        if constexpr (R > 1) HB_TILE_LOAD(2, c10, stride);
        if constexpr (R > 1 && S > 1) HB_TILE_LOAD(3, c11, stride);
    }
    for (int64_t i = 0; i < steps; i++, a.p += a.beside, b += BLOCK) {
        HB_TILE_LOAD(4, a.p, a_stride);
        HB_TILE_LOAD(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (S > 1) { HB_TILE_LOAD(7, b + b_next, 64); _tile_dpbf16ps(1, 4, 7); }
        if constexpr (R > 1) { HB_TILE_LOAD(5, a.p + a.below, a_stride); _tile_dpbf16ps(2, 5, 6); }
        if constexpr (R > 1 && S > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c00, stride);
    if constexpr (S > 1) _tile_stored(1, c01, stride);
    if constexpr (R > 1) _tile_stored(2, c10, stride);
    if constexpr (R > 1 && S > 1) _tile_stored(3, c11, stride);
#else
    constexpr int ROWS = 8;
    for (int half = 0; half < 16 * R; half += ROWS) {
        const uint16_t* rows = a.p + half / 16 * a.below + half % 16 * a.row;
        float* to = c + half * ldc;
        F acc[ROWS][S];
        for (int r = 0; r < ROWS; r++) for (int s = 0; s < S; s++) acc[r][s] = first ? V::zero() : V::load(to + r * ldc + 16 * s);
        for (int64_t i = 0; i < steps * 16; i++) {
            const uint16_t *bp = b + 32 * i, *ap = rows + i / 16 * a.beside + i % 16 * 2;
            __m512bh bs[S];
            for (int s = 0; s < S; s++) bs[s] = (__m512bh)_mm512_loadu_si512(bp + s * b_next);
            for (int r = 0; r < ROWS; r++) {
                int32_t pair;
                memcpy(&pair, ap + a.row * r, 4);
                const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
                for (int s = 0; s < S; s++) acc[r][s] = _mm512_dpbf16_ps(acc[r][s], bs[s], x);
            }
        }
        for (int r = 0; r < ROWS; r++) for (int s = 0; s < S; s++) V::store(to + r * ldc + 16 * s, acc[r][s]);
    }
#endif
}

// Steps at a time, so that a few rows of A and as many columns of B stay in the nearest cache.
inline int64_t strip(int64_t steps) { return ceil_div(steps, ceil_div(steps, 10)); }

// All of C: a_blocks x b_blocks blocks of 16 x 16.
inline void multiply_all(A a, int64_t a_blocks, const uint16_t* b, int64_t b_next, int64_t b_blocks, int64_t steps, float* c, int64_t ldc, bool first) {
    const int64_t at_once = strip(steps);
    for (int64_t i = 0; i < a_blocks; i += 2) {
        for (int64_t s = 0; s < steps; s += at_once) {
            for (int64_t j = 0; j < b_blocks; j += 2) {
                const uint16_t* bj = b + j * b_next + s * BLOCK;
                float* to = c + 16 * i * ldc + 16 * j;
                const int64_t n = least(at_once, steps - s);
                const bool r2 = i + 1 < a_blocks, s2 = j + 1 < b_blocks, begin = first && s == 0;
                if (r2 && s2) multiply<2, 2>(a.at(i, s), bj, b_next, n, to, ldc, begin);
                else if (r2) multiply<2, 1>(a.at(i, s), bj, b_next, n, to, ldc, begin);
                else if (s2) multiply<1, 2>(a.at(i, s), bj, b_next, n, to, ldc, begin);
                else multiply<1, 1>(a.at(i, s), bj, b_next, n, to, ldc, begin);
            }
        }
    }
}

// Even parts of n, each of at most `most`, in whole blocks of 32.
inline int64_t part(int64_t n, int64_t most) { return ceil_div(ceil_div(n, ceil_div(n, most)), 32) * 32; }

// Columns [16 begin, 16 end) of y.
template <int BITS, bool BACK>
void many(const Many& g, int64_t begin, int64_t end) {
    const Matrix& m = *g.m;
    const Decode d(m);
    const int64_t depth = BACK ? m.rows : m.cols, width = BACK ? m.cols : m.rows, last = least(16 * end, width);
    const int64_t deep = part(depth, DEEP), beside = part(last - 16 * begin, BESIDE * DEEP / deep / 32 * 32);
    // where one part is all, a few rows' sums are finished before the next begin; else all wait for the next part
    const int64_t at_once = depth <= DEEP ? 32 : ceil_div(g.rows, 16) * 16;
    uint16_t* panel = (uint16_t*)scratch(1, (size_t)(beside * deep * 2));
    float* c = (float*)scratch(2, (size_t)(at_once * beside) * 4);
    const A here{g.x, depth, 16 * depth, 32}, packed{g.packed, 32, ceil_div(depth, 32) * BLOCK, BLOCK};
    const MatrixUnit unit;
    for (int64_t n0 = 16 * begin; n0 < last; n0 += beside) {
        const int64_t n = least(beside, last - n0), blocks = ceil_div(n, 16), ldc = 16 * blocks;
        for (int64_t k0 = 0; k0 < depth; k0 += deep) {
            const int64_t k1 = least(depth, k0 + deep), steps = ceil_div(k1 - k0, 32), next = steps * BLOCK;
            if (BACK) decode_columns<BITS>(d, k0, k1, n0, n0 + n, next, panel);
            else decode_rows<BITS>(d, k0, k1, n0, n0 + n, next, panel);
            for (int64_t r0 = 0; r0 < g.rows; r0 += at_once) {
                const int64_t rows = least(at_once, g.rows - r0), in_place = r0 < g.in_place ? least(rows, g.in_place - r0) : 0, behind = r0 + in_place - g.in_place;
                multiply_all(here.at(r0 / 16, k0 / 32), in_place / 16, panel, next, blocks, steps, c, ldc, k0 == 0);
                if (in_place < rows) multiply_all(packed.at(behind / 16, k0 / 32), ceil_div(rows - in_place, 16), panel, next, blocks, steps, c + in_place * ldc, ldc, k0 == 0);
                if (k1 < depth) continue;
                for (int64_t r = 0; r < rows; r++) store_row(g.y_type, g.y, (r0 + r) * width + n0, c + r * ldc, g.bias ? g.bias + n0 : nullptr, n);
            }
        }
    }
}

}  // namespace
}  // namespace halfbyte

#endif
