// Few rows of x (up to 8) in float32, where there are no digits (few.h).
//
// For a tile of 16 output rows and a group g of the input:  y += scale_g * sum_k (table[code] * x_k) + shift_g * sum_k x_k
#pragma once
#include "isa.h"
#include "scales.h"

namespace halfbyte {
namespace {

// Neighbours' codes lie in the two halves of a word, so nibble n (0..7) is code ORDER[n], and byte n is BYTES[n].
constexpr int ORDER[8] = {0, 2, 4, 6, 1, 3, 5, 7};
constexpr int BYTES[4] = {0, 2, 1, 3};

template <int M, int C>
inline void add_word4(I v, F table, const float* x, int64_t ldx, F (&acc)[M][C]) {
    const auto step = [&](auto at, F w) {
        constexpr int n = decltype(at)::value;
        for (int i = 0; i < M; i++) acc[i][n % C] = V::fma(w, V::set1(x[i * ldx + ORDER[n]]), acc[i][n % C]);
    };
#define HB_STEP(n) step(Int<n>{}, V::nibble<n>(v, table));
    HB_STEP(0) HB_STEP(1) HB_STEP(2) HB_STEP(3) HB_STEP(4) HB_STEP(5) HB_STEP(6) HB_STEP(7)
#undef HB_STEP
}

template <int M, int C>
inline void add_word8(I v, const float* x, int64_t ldx, F (&acc)[M][C]) {
    const auto step = [&](auto at, F w) {
        constexpr int n = decltype(at)::value;
        for (int i = 0; i < M; i++) acc[i][n % C] = V::fma(w, V::set1(x[i * ldx + BYTES[n]]), acc[i][n % C]);
    };
    step(Int<0>{}, V::byte<0>(v)); step(Int<1>{}, V::byte<1>(v)); step(Int<2>{}, V::byte<2>(v)); step(Int<3>{}, V::byte<3>(v));
}

inline void finish(const Small& s, int64_t t, int row, F total) {
    float y[TILE];
    V::store(y, total);
    store_row(s.type, s.y, row * s.m->rows + t * TILE, y, s.bias ? s.bias + t * TILE : nullptr, s.m->tile_rows(t));
}

// Rows of x from `row`, M of them, in float32.
template <int M, int BITS>
void small_float(const Small& s, int64_t t, int row, const float* scale, const float* shift) {
    constexpr int C = M == 1 ? 4 : M == 2 ? 2 : 1;  // chains of sums, so that none waits for the last
    const Matrix& m = *s.m;
    const int n = m.tile_rows(t);
    const F table = V::load(s.table);
    const float* x = s.x + row * m.cols;
    const uint8_t* p = m.tile(t);
    const int64_t words = m.group * BITS / 32;
    F total[M];
    for (auto& f : total) f = V::zero();
    for (int64_t g = 0; g < m.groups; g++) {
        F sum[M];
        for (auto& f : sum) f = V::zero();
        for (int64_t done = 0; done < words;) {  // sums of sums, as torch's product has them: long ones round more
            F acc[M][C];
            for (auto& a : acc) for (auto& f : a) f = V::zero();
            for (const int64_t stop = least(words, done + BITS); done < stop; done++, p += 4 * n, x += 32 / BITS) {
                prefetch(p);
                const I v = n == TILE ? V::words(p) : V::words(p, n);
                if constexpr (BITS == 4) add_word4<M, C>(v, table, x, m.cols, acc);
                else add_word8<M, C>(V::flip(v), x, m.cols, acc);
            }
            for (int i = 0; i < M; i++) for (int c = 0; c < C; c++) sum[i] = V::add(sum[i], acc[i][c]);
        }
        const F sc = V::load(scale + g * TILE);
        for (int i = 0; i < M; i++) {
            total[i] = V::fma(sc, sum[i], total[i]);
            if (shift) total[i] = V::fma(V::load(shift + g * TILE), V::set1(s.sums[(row + i) * m.groups + g]), total[i]);
        }
    }
    for (int i = 0; i < M; i++) finish(s, t, row + i, total[i]);
}

template <int BITS>
void small_float_rows(const Small& s, int64_t t, const float* scale, const float* shift) {
    int row = 0;
    for (; row + 4 <= s.rows; row += 4) small_float<4, BITS>(s, t, row, scale, shift);
    if (row + 2 <= s.rows) small_float<2, BITS>(s, t, row, scale, shift), row += 2;
    if (row < s.rows) small_float<1, BITS>(s, t, row, scale, shift);
}

}  // namespace
}  // namespace halfbyte
