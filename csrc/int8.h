// Products of codes with codes, for many rows: x in 8-bit integers, the matrix in integers of 4 or 8 bits. Sums are exact.
//
//     y = sum over sub-groups of  x_scale * w_scale * (sum of x * code - middle * sum of x)   + zero points' share
//
// x comes signed, its bytes in the order in which a word holds the matrix's codes: 4 bits: 0 4 1 5, 2 6 3 7 of eight
// neighbours (low halves, high halves), 8 bits: 0 2 1 3 of four.
#pragma once
#include "amx.h"
#include "few.h"
#include "isa.h"
#include "scales.h"

#if defined(__AVX512VNNI__)

namespace halfbyte {
namespace {

inline __m512i broadcast4(const int8_t* p) {
    int32_t four;
    memcpy(&four, p, 4);
    return _mm512_set1_epi32(four);
}

// What a sub-group's sums become. They begin at -middle * (sum of x), so that they are those of codes less the middle.
struct Group {
    const Int8& s;
    const F scale, shift;
    const int64_t i, x_groups, xg;
    Group(const Int8& s, int64_t i, const float* scale, const float* shift)
        : s(s), scale(V::load(scale + i * s.sub / s.m->group * TILE)), shift(shift ? V::load(shift + i * s.sub / s.m->group * TILE) : V::zero()), i(i),
          x_groups(s.x_groups), xg(i * s.sub / s.x_group) {}

    __m512i begin(int64_t row) const { return _mm512_set1_epi32(-s.middle * s.sums[row * s.subs + i]); }
    // c += the share of this group in row `row`; one scale for all of x's row waits for the end
    F add(__m512i sums, int64_t row, F c) const {
        F f = _mm512_cvtepi32_ps(sums), by = scale;
        if (x_groups > 1) by = V::mul(by, V::set1(s.x_scale[row * x_groups + xg]));
        c = V::fma(f, by, c);
        if (!s.m->has_zero()) return c;
        const float x_sum = (float)s.sums[row * s.subs + i];
        return V::fma(shift, V::set1(x_groups > 1 ? x_sum * s.x_scale[row * x_groups + xg] : x_sum), c);
    }
};

inline void finish_int8(const Int8& s, int64_t t, int64_t row, float* c) {
    if (s.x_groups == 1) for (int r = 0; r < TILE; r++) c[r] *= s.x_scale[row];
    store_row(s.y_type, s.y, row * s.m->rows + t * TILE, c, s.bias ? s.bias + t * TILE : nullptr, s.m->tile_rows(t));
}

// Blocks of a KB: A is 16 rows of 64 bytes of x; B 16 words of 16 rows of the matrix, its codes as bytes.
constexpr int64_t BYTES_BLOCK = 1024, MOST_BLOCKS = 1024;  // bytes; and in a row, which has no more than 65536 columns

// Words that the matrix unit takes at a time; 0 where sub-groups are too small for it.
[[maybe_unused]] inline int64_t step_of(const Int8& s) { return s.subs == 1 || s.sub % 64 == 0 ? 16 : s.sub % 32 == 0 ? 8 : 0; }

// Columns [k0, k0 + 64) of a tile as a B block; where they stand so in memory, they stay there.
template <int BITS>
const uint8_t* byte_block(const Matrix& m, int64_t t, int64_t k0, uint8_t* room) {
    const int n = m.tile_rows(t);
    const uint8_t* p = m.tile(t) + k0 * BITS / 32 * 4 * n;
    const int64_t words = least(64, m.cols - k0) * BITS / 32;
    if (BITS == 8 && n == TILE && words == 16) return p;
    for (int64_t w = 0; w < 64 * BITS / 32; w++, p += 4 * n) {
        const I v = w < words ? V::words(p, n) : _mm512_setzero_si512();
        if constexpr (BITS == 4) {
            _mm512_storeu_si512(room + 128 * w, _mm512_and_si512(v, low_halves()));
            _mm512_storeu_si512(room + 128 * w + 64, _mm512_and_si512(_mm512_srli_epi32(v, 4), low_halves()));
        } else {
            _mm512_storeu_si512(room + 64 * w, v);
        }
    }
    return room;
}

// c (16 R, 16 S; 32 a row) += the share of a sub-group: A blocks a, a + a_next times B blocks b[0..] over words [from, to).
template <int R, int S>
void multiply_int8(const Group* group, int64_t row, const uint8_t* a, int64_t a_next, const uint8_t* const (*b)[MOST_BLOCKS], int64_t from, int64_t to, float* c) {
#if defined(__AMX_INT8__)
    const int64_t step = step_of(group->s);
    if (step) {
        alignas(64) int32_t sums[32 * 32];
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
        for (int64_t q = from; q < to; q += step) {
            const int64_t at = q / 16, in = q % 16;
            const uint8_t* x = a + at * BYTES_BLOCK + 4 * in;
            HB_TILE_LOAD(4, x, 64);
            HB_TILE_LOAD(6, b[0][at] + 64 * in, 64);
            _tile_dpbsud(0, 4, 6);
            if constexpr (S > 1) { HB_TILE_LOAD(7, b[1][at] + 64 * in, 64); _tile_dpbsud(1, 4, 7); }
            if constexpr (R > 1) { HB_TILE_LOAD(5, x + a_next, 64); _tile_dpbsud(2, 5, 6); }
            if constexpr (R > 1 && S > 1) _tile_dpbsud(3, 5, 7);
        }
        _tile_stored(0, sums, 128);
        if constexpr (S > 1) _tile_stored(1, sums + 16, 128);
        if constexpr (R > 1) _tile_stored(2, sums + 512, 128);
        if constexpr (R > 1 && S > 1) _tile_stored(3, sums + 528, 128);
        for (int64_t r = 0; r < least(16 * R, group->s.rows - row); r++) {
            const __m512i begin = group->begin(row + r);
            for (int j = 0; j < S; j++) {
                float* to_c = c + 32 * r + 16 * j;
                V::store(to_c, group[j].add(_mm512_add_epi32(begin, _mm512_load_si512(sums + 32 * r + 16 * j)), row + r, V::load(to_c)));
            }
        }
        return;
    }
#endif
    constexpr int ROWS = 8;
    const int64_t rows = group->s.rows - row;
    for (int first = 0; first < 16 * R && first < rows; first += ROWS) {
        const uint8_t* x = a + first / 16 * a_next + first % 16 * 64;
        const auto real = [&](int r) { return row + least(first + r, rows - 1); };  // of rows that are only filling, any
        __m512i acc[ROWS][S];
        for (int r = 0; r < ROWS; r++) for (int j = 0; j < S; j++) acc[r][j] = group->begin(real(r));
        for (int64_t at = from / 16; 16 * at < to; at++) {
            const uint8_t *four = x + at * BYTES_BLOCK, *w0 = b[0][at], *w1 = b[S - 1][at];
            const int64_t last = least(16, to - 16 * at);
            for (int64_t in = at == from / 16 ? from % 16 : 0; in < last; in++) {
                const __m512i w[2] = {_mm512_loadu_si512(w0 + 64 * in), _mm512_loadu_si512(w1 + 64 * in)};
                for (int r = 0; r < ROWS; r++) {
                    const __m512i xs = broadcast4((const int8_t*)four + 64 * r + 4 * in);
                    for (int j = 0; j < S; j++) acc[r][j] = _mm512_dpbusd_epi32(acc[r][j], w[j], xs);
                }
            }
        }
        for (int r = 0; r < ROWS; r++) {
            for (int j = 0; j < S; j++) {
                float* to_c = c + 32 * (first + r) + 16 * j;
                V::store(to_c, group[j].add(acc[r][j], real(r), V::load(to_c)));
            }
        }
    }
}

template <int R, int S>
void block_int8(const Int8& s, int64_t row, int64_t t, const uint8_t* const (*b)[MOST_BLOCKS], const float* scale, const float* shift) {
    alignas(64) float c[32 * 32] = {};
    const int64_t blocks = ceil_div(s.m->cols, 64), per_tile = s.m->groups * TILE;
    const uint8_t* a = (const uint8_t*)s.x + row / 16 * blocks * BYTES_BLOCK;
    for (int64_t i = 0; i < s.subs; i++) {
        const Group group[2] = {{s, i, scale, shift}, {s, i, S > 1 ? scale + per_tile : scale, S > 1 && shift ? shift + per_tile : shift}};
        const int64_t from = i * s.sub / 4, to = s.subs == 1 ? blocks * 16 : from + s.sub / 4;
        multiply_int8<R, S>(group, row, a, blocks * BYTES_BLOCK, b, from, to, c);
    }
    for (int64_t r = 0; r < least(16 * R, s.rows - row); r++) for (int j = 0; j < S; j++) finish_int8(s, t + j, row + r, c + 32 * r + 16 * j);
}

template <int BITS>
void many_int8(const Int8& s, int64_t begin, int64_t end) {
    constexpr int64_t TILES = 8;
    const Matrix& m = *s.m;
    const int64_t blocks = ceil_div(m.cols, 64), per_tile = m.groups * TILE;
    float* scale = (float*)scratch(0, (size_t)(2 * TILES * per_tile) * sizeof(float));
    float* shift = m.has_zero() ? scale + TILES * per_tile : nullptr;
    uint8_t* room = scratch(1, (size_t)(TILES * blocks * BYTES_BLOCK));
    auto at = (const uint8_t* (*)[MOST_BLOCKS])scratch(2, (size_t)(TILES * MOST_BLOCKS) * sizeof(uint8_t*));
    const MatrixUnit unit((int)step_of(s));
    for (int64_t t0 = begin; t0 < end; t0 += TILES) {
        const int64_t tiles = least(TILES, end - t0);
        for (int64_t t = 0; t < tiles; t++) {
            tile_scales(m, t0 + t, (float)s.middle - m.middle, scale + t * per_tile, shift ? shift + t * per_tile : nullptr);
            for (int64_t k = 0; k < blocks; k++) at[t][k] = byte_block<BITS>(m, t0 + t, 64 * k, room + (t * blocks + k) * BYTES_BLOCK);
        }
        for (int64_t row = 0; row < s.rows; row += 32) {
            for (int64_t t = 0; t < tiles; t += 2) {
                const auto b = at + t;
                const float *sc = scale + t * per_tile, *sh = shift ? shift + t * per_tile : nullptr;
                const bool r2 = row + 16 < s.rows, s2 = t + 1 < tiles;
                if (r2 && s2) block_int8<2, 2>(s, row, t0 + t, b, sc, sh);
                else if (r2) block_int8<2, 1>(s, row, t0 + t, b, sc, sh);
                else if (s2) block_int8<1, 2>(s, row, t0 + t, b, sc, sh);
                else block_int8<1, 1>(s, row, t0 + t, b, sc, sh);
            }
        }
    }
}

}  // namespace
}  // namespace halfbyte

#endif
