// Few rows of x (up to 8), in digits: what decoding does. Bound by reading the codes, so nothing else may cost.
//
//     y = sum over blocks  scale * unit * (sum of digits * code - middle * sum of digits)   + zero points' share
//
// Codes stay integers and never leave registers; their products are summed exactly. Of 4-bit tables a code becomes a
// number of 16 bits, in two bytes that are looked up apart.
#pragma once
#include "isa.h"
#include "scales.h"

#if defined(__AVX512VNNI__)

namespace halfbyte {
namespace {

inline const __m512i low_halves() { return _mm512_set1_epi32(0x0f0f0f0f); }

// gcc keeps sums in registers only where no loop over them is left, and by itself leaves some.
#define HB_UNROLL _Pragma("GCC unroll 8")

enum Codes { FOUR_BITS, EIGHT_BITS, LOOKED_UP };

constexpr int64_t SCALES_AT_A_TIME = 8;  // groups; all at once would leave the memory idle

// M rows of x, of P digits each, with tiles t and, where registers last for it, t + 1.
template <Codes CODES, int P, int M>
struct FewRows {
    static constexpr int T = M * P <= 8 ? 2 : 1, HALVES = CODES == EIGHT_BITS ? 1 : 2, BITS = CODES == EIGHT_BITS ? 8 : 4;
    static constexpr int C = M * P * T <= 4 ? HALVES : 1;  // chains of sums, so that none waits for the last

    const Few& s;
    const Matrix& m;
    const int64_t t, row, end;
    const __m512i high_bytes, low_bytes;
    const uint8_t* p[T];
    int n[T];
    __mmask16 lanes[T];
    F total[M][T];
    alignas(64) float scale[T][SCALES_AT_A_TIME * TILE], shift[T][SCALES_AT_A_TIME * TILE];

    FewRows(const Few& s, int64_t t, int64_t row, int64_t end)
        : s(s), m(*s.m), t(t), row(row), end(end), high_bytes(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)s.high))),
          low_bytes(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)s.low))) {
        for (int j = 0; j < T; j++) {
            const int64_t tile = least(t + j, end - 1);
            p[j] = m.tile(tile), n[j] = m.tile_rows(tile), lanes[j] = (__mmask16)((1u << n[j]) - 1);
        }
        for (auto& of_row : total) for (auto& f : of_row) f = V::zero();
    }

    // A word of each tile times M rows' digits.
    void add(const int32_t*& x, I (&sum)[C][M][T][P]) {
        I high[T][HALVES], low[T][HALVES];
        HB_UNROLL for (int j = 0; j < T; j++) {
            prefetch(p[j]);
            const I v = _mm512_maskz_loadu_epi32(lanes[j], p[j]);
            p[j] += 4 * n[j];
            HB_UNROLL for (int h = 0; h < HALVES; h++) {
                high[j][h] = CODES == EIGHT_BITS ? v : _mm512_and_si512(h ? _mm512_srli_epi32(v, 4) : v, low_halves());
                if constexpr (CODES == LOOKED_UP) {
                    low[j][h] = _mm512_shuffle_epi8(low_bytes, high[j][h]);
                    high[j][h] = _mm512_shuffle_epi8(high_bytes, high[j][h]);
                }
            }
        }
        HB_UNROLL for (int r = 0; r < M; r++) {
            HB_UNROLL for (int h = 0; h < HALVES; h++) {
                HB_UNROLL for (int d = 0; d < P; d++) {
                    const I digits = _mm512_set1_epi32(*x++);
                    auto& of_row = sum[h % C][r];
                    HB_UNROLL for (int j = 0; j < T; j++) {
                        of_row[j][d] = _mm512_dpbusd_epi32(of_row[j][d], high[j][h], digits);
                        if (CODES == LOOKED_UP && d == P - 1) of_row[j][0] = _mm512_dpbusd_epi32(of_row[j][0], low[j][h], digits);
                    }
                }
            }
        }
    }
    static F worth(const I (&sum)[P]) {
        if constexpr (P == 1) return _mm512_cvtepi32_ps(sum[0]);
        const F low = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[P > 1], 8), sum[0]));
        if constexpr (P <= 2) return low;
        return V::fma(_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(sum[P - 1], 8), sum[P - 2])), V::set1(65536), low);
    }
    void block(const int32_t*& x, int64_t words, int64_t b, int64_t g) {
        I sum[C][M][T][P];
        const int32_t* begin = s.begin + (row * s.blocks + b * M) * P;
        HB_UNROLL for (int r = 0; r < M; r++) {
            HB_UNROLL for (int j = 0; j < T; j++) {
                HB_UNROLL for (int d = 0; d < P; d++) {
                    sum[0][r][j][d] = _mm512_set1_epi32(begin[r * P + d]);
                    if (C > 1) sum[C - 1][r][j][d] = _mm512_setzero_si512();
                }
            }
        }
        for (int64_t w = 0; w < words; w++) add(x, sum);
        const float *unit = s.unit + row * s.blocks + b * M, *x_sum = s.sum + row * s.blocks + b * M;
        HB_UNROLL for (int j = 0; j < T; j++) {
            const F by = V::load(scale[j] + g * TILE);
            HB_UNROLL for (int r = 0; r < M; r++) {
                if (C > 1) HB_UNROLL for (int d = 0; d < P; d++) sum[0][r][j][d] = _mm512_add_epi32(sum[0][r][j][d], sum[C - 1][r][j][d]);
                total[r][j] = V::fma(V::mul(by, V::set1(unit[r])), worth(sum[0][r][j]), total[r][j]);
                if (m.has_zero()) total[r][j] = V::fma(V::load(shift[j] + g * TILE), V::set1(x_sum[r]), total[r][j]);
            }
        }
    }
    void run() {
        const int32_t* x = s.words + row * s.row_words();
        int64_t b = 0;  // blocks lie inside groups
        for (int64_t g0 = 0; g0 < m.groups; g0 += SCALES_AT_A_TIME) {
            const int64_t g1 = least(g0 + SCALES_AT_A_TIME, m.groups);
            for (int j = 0; j < T; j++) tile_scales(m, least(t + j, end - 1), s.center, g0, g1, scale[j], m.has_zero() ? shift[j] : nullptr);
            for (int64_t g = g0; g < g1; g++) {
                for (int64_t k = 0; k < m.group; k += s.block) block(x, least(s.block, m.group - k) * BITS / 32, b++, g - g0);
            }
        }
        for (int j = 0; j < T && t + j < end; j++) {
            for (int64_t r = 0; r < least(M, s.rows - row); r++) {
                alignas(64) float y[TILE];
                V::store(y, total[r][j]);
                store_row(s.type, s.y, (row + r) * m.rows + (t + j) * TILE, y, s.bias ? s.bias + (t + j) * TILE : nullptr, n[j]);
            }
        }
    }
};

template <Codes CODES, int P, int M>
void few_rows(const Few& s, int64_t row, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t += FewRows<CODES, P, M>::T) FewRows<CODES, P, M>(s, t, row, end).run();
}

template <Codes CODES, int P>
void few_digits(const Few& s, int64_t begin, int64_t end) {
    constexpr int64_t AT_A_TIME = 4;  // tiles, which then are in a cache for the rows that come after
    for (int64_t t = begin; t < end; t += AT_A_TIME) {
        const int64_t stop = least(t + AT_A_TIME, end);
        for (int64_t row = 0; row < s.rows; row += 4) {
            switch (s.beside(row)) {
                case 4: few_rows<CODES, P, 4>(s, row, t, stop); break;
                case 2: few_rows<CODES, P, 2>(s, row, t, stop); break;
                default: few_rows<CODES, P, 1>(s, row, t, stop);
            }
        }
    }
}

#undef HB_UNROLL

}  // namespace
}  // namespace halfbyte

#endif
