// A tile's codes as float32 values, and whole rows of them: dequantizing from the tiled layout.
#pragma once
#include "scales.h"

namespace halfbyte {
namespace {

// Calls f(Int<k>, value) with the float32 values of code k of a word, 0 to 7 (or 3), of a tile's rows.
struct Decode {
    const Matrix& m;
    F table;
    bool subtract, add;
    F middle;
    explicit Decode(const Matrix& m) : m(m), subtract(m.has_zero() && !m.zero_added), add(m.zero_added), middle(V::set1(128 - m.middle)) {
        table = m.bits == 4 ? V::load(m.table) : V::zero();
    }
    F value(F code, F scale, F zero) const {
        if (subtract) code = V::sub(code, zero);
        code = V::mul(code, scale);
        return add ? V::add(code, zero) : code;
    }
    template <class Each> void word4(I v, F scale, F zero, Each f) const {
        f(Int<0>{}, value(V::nibble<0>(v, table), scale, zero)), f(Int<2>{}, value(V::nibble<1>(v, table), scale, zero));
        f(Int<4>{}, value(V::nibble<2>(v, table), scale, zero)), f(Int<6>{}, value(V::nibble<3>(v, table), scale, zero));
        f(Int<1>{}, value(V::nibble<4>(v, table), scale, zero)), f(Int<3>{}, value(V::nibble<5>(v, table), scale, zero));
        f(Int<5>{}, value(V::nibble<6>(v, table), scale, zero)), f(Int<7>{}, value(V::nibble<7>(v, table), scale, zero));
    }
    template <class Each> void word8(I v, F scale, F zero, Each f) const {
        v = V::flip(v);
        f(Int<0>{}, value(V::add(V::byte<0>(v), middle), scale, zero)), f(Int<2>{}, value(V::add(V::byte<1>(v), middle), scale, zero));
        f(Int<1>{}, value(V::add(V::byte<2>(v), middle), scale, zero)), f(Int<3>{}, value(V::add(V::byte<3>(v), middle), scale, zero));
    }
};

// 16 vectors of 16 lanes, turned: rows become columns.
#if defined(__AVX512F__)
inline void transpose(I (&r)[16]) {
    I t[16];
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 16; i += 8) {
        for (int j = i; j < i + 4; j++) t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88), t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
    }
    for (int j = 0; j < 8; j++) r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88), r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
}

inline void transpose(F (&r)[16]) {
    I t[16];
    for (int i = 0; i < 16; i++) t[i] = _mm512_castps_si512(r[i]);
    transpose(t);
    for (int i = 0; i < 16; i++) r[i] = _mm512_castsi512_ps(t[i]);
}
#else
inline void transpose(F (&r)[16]) {
    float in[16][16], out[16][16];
    for (int i = 0; i < 16; i++) V::store(in[i], r[i]);
    for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) out[j][i] = in[i][j];
    for (int i = 0; i < 16; i++) r[i] = V::load(out[i]);
}
#endif

// Rows of tiles [begin, end) at y (m.rows, m.cols).
template <int BITS>
void dequantize_tiles(const Matrix& m, int64_t begin, int64_t end, Type type, uint8_t* y) {
    constexpr int CODES = 32 / BITS;
    const Decode d(m);
    float* scale = (float*)scratch(0, (size_t)(2 * m.groups * TILE) * sizeof(float));
    float* zero = scale + m.groups * TILE;
    for (int64_t t = begin; t < end; t++) {
        const int n = m.tile_rows(t);
        tile_values(m.scale, t * TILE, n, m.groups, scale);
        tile_values(m.zero, t * TILE, n, m.groups, zero);
        const uint8_t* p = m.tile(t);
        for (int64_t k = 0; k < m.cols; k += 16) {
            const int64_t some = least(16, m.cols - k);
            F f[16];
            for (int64_t i = 0; i < 16; i += CODES, p += 4 * n) {
                if (i >= some) break;
                prefetch(p);
                const I v = n == TILE ? V::words(p) : V::words(p, n);
                const int64_t g = (k + i) / m.group;
                const auto keep = [&](auto at, F value) { f[i + decltype(at)::value] = value; };
                if constexpr (BITS == 4) d.word4(v, V::load(scale + g * TILE), V::load(zero + g * TILE), keep);
                else d.word8(v, V::load(scale + g * TILE), V::load(zero + g * TILE), keep);
            }
            for (int64_t i = some; i < 16; i++) f[i] = V::zero();
            transpose(f);
            for (int r = 0; r < n; r++) {
                const int64_t at = (t * TILE + r) * m.cols + k;
                if (some == 16) {
                    V::store(type, y + at * size_of(type), f[r]);
                } else {
                    float row[16];
                    V::store(row, f[r]);
                    for (int64_t i = 0; i < some; i++) store_float(type, y, at + i, row[i]);
                }
            }
        }
    }
}

}  // namespace
}  // namespace halfbyte
