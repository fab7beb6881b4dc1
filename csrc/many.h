// Many rows of x: matrix products in bfloat16, for which a block of the matrix is decoded into the cache and used for all
// rows. Bound by arithmetic.
//
// Both directions are one kernel. Its operands stand in blocks of a KB: A in 16 rows of 32 neighbours, B in 16 pairs of
// 16 columns, so that a block is a tile register and a row of it a vector register.
//
//     forward    y (rows, out)   = A: x            B: the matrix, decoded with its rows as columns
//     backward   dx' (in, rows)  = A: the matrix, decoded with its columns as rows    B: dy
#pragma once
#include "amx.h"
#include "decode.h"
#include "isa.h"
#include "scales.h"

#if defined(__AVX512BF16__)

namespace halfbyte {
namespace {

constexpr int64_t BLOCK = 512;  // bfloat16 values of a block: 16 x 32

inline I two_rows(F low, F high) {  // 32 neighbours
    return (I)_mm512_cvtne2ps_pbh(high, low);
}
inline I interleaved(F even, F odd) {  // pairs of 16 columns
    alignas(64) static const uint16_t order[32] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), two_rows(even, odd));
}

// Columns [k0, k1) of tile t as B blocks, one below the other; zeros fill the last.
template <int BITS>
void decode_b(const Decode& d, int64_t t, int64_t k0, int64_t k1, const float* scale, const float* zero, uint16_t* out) {
    constexpr int CODES = 32 / BITS;
    const Matrix& m = d.m;
    const int n = m.tile_rows(t);
    const uint8_t* p = m.tile(t) + k0 / CODES * 4 * n;
    F sc = V::zero(), z = V::zero();
    int64_t same_until = k0;
    for (int64_t k = k0; k < k1; k += CODES, p += 4 * n, out += 16 * CODES) {
        if (k >= same_until) {
            const int64_t g = k / m.group;
            sc = V::load(scale + g * TILE);
            if (zero) z = V::load(zero + g * TILE);
            same_until = (g + 1) * m.group;
        }
        prefetch(p);
        const I v = n == TILE ? V::words(p) : V::words(p, n);
        F f[CODES];
        const auto keep = [&](auto at, F value) { f[decltype(at)::value] = value; };
        if constexpr (BITS == 4) d.word4(v, sc, z, keep);
        else d.word8(v, sc, z, keep);
        for (int i = 0; i < CODES; i += 2) _mm512_storeu_si512(out + 16 * i, interleaved(f[i], f[i + 1]));
    }
    for (; k1 % 32; k1 += CODES, out += 16 * CODES) memset(out, 0, 32 * CODES);
}

// Columns [k0, k1) of tiles t and t + 1 (zeros if there is none) as A blocks: 16 columns of 32 rows, `step` values apart.
template <int BITS>
void decode_a(const Decode& d, int64_t t, int64_t k0, int64_t k1, const float* scale, const float* zero, int64_t step, uint16_t* out) {
    constexpr int CODES = 32 / BITS;
    const Matrix& m = d.m;
    const bool two = t + 1 < m.tiles();
    const int n0 = m.tile_rows(t), n1 = two ? m.tile_rows(t + 1) : 0;
    const uint8_t *p0 = m.tile(t) + k0 / CODES * 4 * n0, *p1 = two ? m.tile(t + 1) + k0 / CODES * 4 * n1 : p0;
    F s0 = V::zero(), s1 = s0, z0 = s0, z1 = s0;
    int64_t same_until = k0;
    for (int64_t k = k0; k < k1; k += CODES, p0 += 4 * n0, p1 += 4 * n1) {
        if (k >= same_until) {
            const int64_t g = k / m.group, next = m.groups * TILE;
            s0 = V::load(scale + g * TILE);
            s1 = two ? V::load(scale + next + g * TILE) : V::zero();
            if (zero) z0 = V::load(zero + g * TILE), z1 = two ? V::load(zero + next + g * TILE) : V::zero();
            same_until = (g + 1) * m.group;
        }
        prefetch(p0), prefetch(p1);
        const I v0 = n0 == TILE ? V::words(p0) : V::words(p0, n0), v1 = n1 == TILE ? V::words(p1) : V::words(p1, n1);
        F f[CODES];
        const auto keep = [&](auto at, F value) { f[decltype(at)::value] = value; };
        const auto both = [&](auto at, F value) {
            constexpr int i = decltype(at)::value;
            _mm512_storeu_si512(out + (k - k0 + i) / 16 * step + (k - k0 + i) % 16 * 32, two_rows(f[i], value));
        };
        if constexpr (BITS == 4) d.word4(v0, s0, z0, keep), d.word4(v1, s1, z1, both);
        else d.word8(v0, s0, z0, keep), d.word8(v1, s1, z1, both);
    }
    for (int64_t k = k1 - k0; k % 16; k++) memset(out + k / 16 * step + k % 16 * 32, 0, 64);
}

// Rows [16 i, 16 i + 16) of x (rows, cols) as A blocks, or as B blocks; zeros where there are no more.
inline void pack_a(const uint16_t* x, int64_t rows, int64_t cols, int64_t i, uint16_t* out) {
    for (int64_t k = 0; k < cols; k += 32, out += BLOCK) {
        const __mmask32 some = cols - k >= 32 ? ~0u : (1u << (cols - k)) - 1;
        for (int64_t r = 0; r < 16; r++) {
            const bool there = 16 * i + r < rows;
            _mm512_storeu_si512(out + 32 * r, there ? _mm512_maskz_loadu_epi16(some, x + (16 * i + r) * cols + k) : _mm512_setzero_si512());
        }
    }
}
inline void pack_b(const uint16_t* x, int64_t rows, int64_t cols, int64_t i, uint16_t* out) {
    for (int64_t k = 0; k < cols; k += 32, out += BLOCK) {
        const __mmask32 some = cols - k >= 32 ? ~0u : (1u << (cols - k)) - 1;
        I r[16];
        for (int64_t j = 0; j < 16; j++) {
            r[j] = 16 * i + j < rows ? _mm512_maskz_loadu_epi16(some, x + (16 * i + j) * cols + k) : _mm512_setzero_si512();
        }
        transpose(r);
        for (int64_t j = 0; j < 16; j++) _mm512_storeu_si512(out + 32 * j, r[j]);
    }
}

// C (16 R rows, 16 S columns; ldc) = or += the sum over `steps` of A block [r][step] times B block [s][step].
template <int R, int S>
void multiply(const uint16_t* a, int64_t a_next, const uint16_t* b, int64_t b_next, int64_t steps, float* c, int64_t ldc, bool first) {
#if defined(__AMX_BF16__)
    float *c00 = c, *c01 = c + 16, *c10 = c + 16 * ldc, *c11 = c10 + 16;
    const int64_t stride = ldc * 4;
    if (first) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        HB_TILE_LOAD(0, c00, stride);
        if constexpr (S > 1) HB_TILE_LOAD(1, c01, stride);
        if constexpr (R > 1) HB_TILE_LOAD(2, c10, stride);
        if constexpr (R > 1 && S > 1) HB_TILE_LOAD(3, c11, stride);
    }
    for (int64_t i = 0; i < steps; i++, a += BLOCK, b += BLOCK) {
        HB_TILE_LOAD(4, a, 64);
        HB_TILE_LOAD(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (S > 1) { HB_TILE_LOAD(7, b + b_next, 64); _tile_dpbf16ps(1, 4, 7); }
        if constexpr (R > 1) { HB_TILE_LOAD(5, a + a_next, 64); _tile_dpbf16ps(2, 5, 6); }
        if constexpr (R > 1 && S > 1) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c00, stride);
    if constexpr (S > 1) _tile_stored(1, c01, stride);
    if constexpr (R > 1) _tile_stored(2, c10, stride);
    if constexpr (R > 1 && S > 1) _tile_stored(3, c11, stride);
#else
    constexpr int ROWS = 8;
    for (int half = 0; half < 16 * R; half += ROWS) {
        const uint16_t* rows = a + half / 16 * a_next + half % 16 * 32;
        float* to = c + half * ldc;
        F acc[ROWS][S];
        for (int r = 0; r < ROWS; r++) for (int s = 0; s < S; s++) acc[r][s] = first ? V::zero() : V::load(to + r * ldc + 16 * s);
        for (int64_t i = 0; i < steps * 16; i++) {
            const uint16_t *bp = b + 32 * i, *ap = rows + i / 16 * BLOCK + i % 16 * 2;
            __m512bh bs[S];
            for (int s = 0; s < S; s++) bs[s] = (__m512bh)_mm512_loadu_si512(bp + s * b_next);
            for (int r = 0; r < ROWS; r++) {
                int32_t pair;
                memcpy(&pair, ap + 32 * r, 4);
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
inline void multiply_all(const uint16_t* a, int64_t a_next, int64_t a_blocks, const uint16_t* b, int64_t b_next, int64_t b_blocks, int64_t steps, float* c,
                         int64_t ldc, bool first) {
    const int64_t at_once = strip(steps);
    for (int64_t i = 0; i < a_blocks; i += 2) {
        for (int64_t s = 0; s < steps; s += at_once) {
            for (int64_t j = 0; j < b_blocks; j += 2) {
                const uint16_t *ai = a + i * a_next + s * BLOCK, *bj = b + j * b_next + s * BLOCK;
                float* to = c + 16 * i * ldc + 16 * j;
                const int64_t n = least(at_once, steps - s);
                const bool r2 = i + 1 < a_blocks, s2 = j + 1 < b_blocks, begin = first && s == 0;
                if (r2 && s2) multiply<2, 2>(ai, a_next, bj, b_next, n, to, ldc, begin);
                else if (r2) multiply<2, 1>(ai, a_next, bj, b_next, n, to, ldc, begin);
                else if (s2) multiply<1, 2>(ai, a_next, bj, b_next, n, to, ldc, begin);
                else multiply<1, 1>(ai, a_next, bj, b_next, n, to, ldc, begin);
            }
        }
    }
}

// How much of the matrix is decoded at a time: BESIDE columns of B (or rows of A) that are DEEP where the product sums, or
// more columns where they are less deep.
constexpr int64_t BESIDE = 256, DEEP = 1024;

// Even parts of n, each of at most `most`, in whole blocks of 32.
inline int64_t part(int64_t n, int64_t most) { return ceil_div(ceil_div(n, ceil_div(n, most)), 32) * 32; }

// Where one part is all, a few rows' sums are finished before the next begin; else all wait for the next part.
inline int64_t rows_at_once(const Many& g, int64_t depth) { return depth <= DEEP ? least(32, ceil_div(g.rows, 16) * 16) : ceil_div(g.rows, 16) * 16; }

// y for the matrix's tiles [begin, end).
template <int BITS>
void many_forward(const Many& g, int64_t begin, int64_t end) {
    const Matrix& m = *g.m;
    const Decode d(m);
    const int64_t x_next = ceil_div(m.cols, 32) * BLOCK, per_tile = m.groups * TILE, deep = part(m.cols, DEEP), at_once = rows_at_once(g, m.cols);
    const int64_t beside = part((end - begin) * TILE, BESIDE * DEEP / deep / 32 * 32), most = beside / TILE;
    uint16_t* panel = (uint16_t*)scratch(1, (size_t)(beside * deep * 2));
    float* scale = (float*)scratch(0, (size_t)(2 * most * per_tile) * 4);
    float* zero = m.has_zero() ? scale + most * per_tile : nullptr;
    float* c = (float*)scratch(2, (size_t)(at_once * beside) * 4);
    const MatrixUnit unit;
    for (int64_t t0 = begin; t0 < end; t0 += most) {
        const int64_t tiles = least(most, end - t0), ldc = tiles * TILE, n0 = t0 * TILE, n = least(m.rows - n0, ldc);
        for (int64_t t = 0; t < tiles; t++) {
            tile_values(m.scale, (t0 + t) * TILE, m.tile_rows(t0 + t), m.groups, scale + t * per_tile);
            if (zero) tile_values(m.zero, (t0 + t) * TILE, m.tile_rows(t0 + t), m.groups, zero + t * per_tile);
        }
        for (int64_t k0 = 0; k0 < m.cols; k0 += deep) {
            const int64_t k1 = least(m.cols, k0 + deep), steps = ceil_div(k1 - k0, 32);
            for (int64_t t = 0; t < tiles; t++)
                decode_b<BITS>(d, t0 + t, k0, k1, scale + t * per_tile, zero ? zero + t * per_tile : nullptr, panel + t * steps * BLOCK);
            for (int64_t r0 = 0; r0 < g.rows; r0 += at_once) {
                const int64_t rows = least(at_once, g.rows - r0);
                multiply_all(g.packed + r0 / 16 * x_next + k0 / 32 * BLOCK, x_next, ceil_div(rows, 16), panel, steps * BLOCK, tiles, steps, c, ldc, k0 == 0);
                if (k1 < m.cols) continue;
                for (int64_t r = 0; r < rows; r++) store_row(g.y_type, g.y, (r0 + r) * m.rows + n0, c + r * ldc, g.bias ? g.bias + n0 : nullptr, n);
            }
        }
    }
}

// dx for the matrix's columns [16 begin, 16 end).
template <int BITS>
void many_backward(const Many& g, int64_t begin, int64_t end) {
    const Matrix& m = *g.m;
    const Decode d(m);
    const int64_t dy_next = ceil_div(m.rows, 32) * BLOCK, per_tile = m.groups * TILE, deep = part(m.rows, DEEP) / TILE, at_once = rows_at_once(g, m.rows);
    const int64_t last = least(16 * end, m.cols), beside = part(last - 16 * begin, BESIDE * DEEP / (deep * TILE) / 32 * 32);
    uint16_t* panel = (uint16_t*)scratch(1, (size_t)(beside * deep * TILE * 2));
    float* scale = (float*)scratch(0, (size_t)(4 * per_tile) * 4);
    float* zero = m.has_zero() ? scale + 2 * per_tile : nullptr;
    float* c = (float*)scratch(2, (size_t)(at_once * beside) * 4);  // columns of dx as rows
    const MatrixUnit unit;
    for (int64_t k0 = 16 * begin; k0 < last; k0 += beside) {
        const int64_t k1 = least(last, k0 + beside), blocks = ceil_div(k1 - k0, 16);
        for (int64_t t0 = 0; t0 < m.tiles(); t0 += deep) {
            const int64_t tiles = least(deep, m.tiles() - t0), steps = ceil_div(tiles, 2);
            for (int64_t t = t0; t < t0 + tiles; t += 2) {
                for (int64_t i = 0; i < least(2, t0 + tiles - t); i++) {
                    tile_values(m.scale, (t + i) * TILE, m.tile_rows(t + i), m.groups, scale + i * per_tile);
                    if (zero) tile_values(m.zero, (t + i) * TILE, m.tile_rows(t + i), m.groups, zero + i * per_tile);
                }
                decode_a<BITS>(d, t, k0, k1, scale, zero, steps * BLOCK, panel + (t - t0) / 2 * BLOCK);
            }
            for (int64_t r0 = 0; r0 < g.rows; r0 += at_once) {
                const int64_t rows = least(at_once, g.rows - r0), ldc = ceil_div(rows, 16) * 16;
                multiply_all(panel, steps * BLOCK, blocks, g.packed + r0 / 16 * dy_next + t0 / 2 * BLOCK, dy_next, ldc / 16, steps, c, ldc, t0 == 0);
                if (t0 + tiles < m.tiles()) continue;
                for (int64_t r = 0; r < rows; r += 16) {
                    for (int64_t k = k0; k < k1; k += 16) {
                        I turned[16];
                        for (int i = 0; i < 16; i++) turned[i] = _mm512_loadu_si512(c + (k - k0 + i) * ldc + r);
                        transpose(turned);
                        for (int64_t j = 0; j < least(16, rows - r); j++)
                            store_row(g.y_type, g.y, (r0 + r + j) * m.cols + k, (const float*)&turned[j], nullptr, least(16, k1 - k));
                    }
                }
            }
        }
    }
}

}  // namespace
}  // namespace halfbyte

#endif
