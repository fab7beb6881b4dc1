// Rows of x as digits, so that few of them are multiplied with codes in integers, which machines do fastest (few.h).
//
// A block of neighbours of a row has a unit, a power of two, and each number is unit * (d0 + 256 d1 ...) with digits of
// a signed byte: two hold 14 bits below the block's largest number (bfloat16 has 8 bits, float16 11), four hold 30.
#pragma once
#include "isa.h"
#include "simd.h"

#if defined(__AVX512VNNI__)

namespace halfbyte {
namespace {

// With 4 bits, a word's low halves and its high ones are multiplied apart.
constexpr int halves(int bits) { return bits == 4 ? 2 : 1; }

// What sums of products begin with: the codes' middle times minus the digits' sum. Of a table's two digits the higher
// meets both of x's, the lower only x's higher one: what that leaves out is its mean, which makes half of the sum.
inline void begin_sums(const Few& f, const int32_t* totals, int32_t* begin) {
    for (int d = 0; d < f.planes; d++) begin[d] = f.table ? -128 * totals[d] : -(1 << (f.m->bits - 1)) * totals[d];
    if (f.table) begin[0] += totals[0] / 2;
}

// Up to n of sixteen numbers' ordered digits go, four numbers at a time, where the kernel reads them.
template <int BITS, int P>
void place(const __m128i (&digits)[P], int64_t k, int64_t n, int32_t* to, int64_t word_step) {
    constexpr int H = halves(BITS);
    alignas(16) int32_t fours[4][P];
    __m128i* out = (__m128i*)fours;
    if constexpr (P == 1) {
        out[0] = digits[0];
    } else {
        const __m128i a = _mm_unpacklo_epi32(digits[0], digits[1]), b = _mm_unpackhi_epi32(digits[0], digits[1]);
        if constexpr (P == 2) {
            out[0] = a, out[1] = b;
        } else {
            const __m128i c = _mm_unpacklo_epi32(digits[2], digits[3]), d = _mm_unpackhi_epi32(digits[2], digits[3]);
            out[0] = _mm_unpacklo_epi64(a, c), out[1] = _mm_unpackhi_epi64(a, c), out[2] = _mm_unpacklo_epi64(b, d), out[3] = _mm_unpackhi_epi64(b, d);
        }
    }
    to += k / (4 * H) * word_step;
    for (int i = 0; 4 * i < n; i++) memcpy(to + i / H * word_step + i % H * P, fours[i], sizeof fours[i]);
}

template <int BITS> __m128i in_order(__m128i digits) {  // of the codes in a word: see layout.h
    return _mm_shuffle_epi8(digits, BITS == 4 ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                                           : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15));
}

struct Digits {  // where those of a row go, which stands among `beside` rows that the kernel takes together
    int64_t beside, in;
    int32_t* words;  // [word][beside][half][plane]
    int32_t* begin;  // [block][beside][plane]
    float *unit, *sum;  // [block][beside]
    Digits(const Few& f, int64_t row)
        : beside(f.beside(row / 4 * 4)), in(row % 4), words(f.words + row / 4 * 4 * f.row_words()), begin(f.begin + row / 4 * 4 * f.blocks * f.planes),
          unit(f.unit + row / 4 * 4 * f.blocks), sum(f.sum + row / 4 * 4 * f.blocks) {}
};

// each(row, its x's row): what fills up to `beside` is any row.
template <class Each> void each_row(const Few& f, Each each) {
    for (int64_t part = 0; part < f.rows; part += 4) for (int64_t row = part; row < part + f.beside(part); row++) each(Digits(f, row), least(row, f.rows - 1));
}

template <class Each> void each_block(const Few& f, Each each) {  // each(block, first column, columns)
    int64_t b = 0;
    for (int64_t g = 0; g < f.m->cols; g += f.m->group) for (int64_t k = 0; k < f.m->group; k += f.block) each(b++, g + k, least(f.block, f.m->group - k));
}

inline int32_t total(__m128i sums) {
    alignas(16) int32_t parts[4];
    _mm_store_si128((__m128i*)parts, sums);
    return parts[0] + parts[1] + parts[2] + parts[3];
}

template <int BITS, int P>
void split_block(const Few& f, const Digits& out, int64_t b, int64_t k0, int64_t n, F by, F again, float unit, const float* x) {
    const int64_t word_step = out.beside * halves(BITS) * P;
    int32_t* to = out.words + out.in * halves(BITS) * P;
    __m128i sums[P] = {};
    for (int64_t k = 0; k < n; k += TILE) {
        I v = _mm512_cvtps_epi32(V::mul(V::mul(load_some(x + k, n - k), by), again));
        __m128i digits[P];
        for (int d = 0; d < P; d++) {
            digits[d] = _mm512_cvtepi32_epi8(v);
            sums[d] = _mm_dpbusd_epi32(sums[d], _mm_set1_epi8(1), digits[d]);
            v = _mm512_srai_epi32(_mm512_sub_epi32(v, _mm512_cvtepi8_epi32(digits[d])), 8);
            digits[d] = in_order<BITS>(digits[d]);
        }
        place<BITS, P>(digits, k0 + k, least(TILE, n - k), to, word_step);
    }
    int32_t totals[P];
    float sum = 0;
    for (int d = P - 1; d >= 0; d--) totals[d] = total(sums[d]), sum = 256 * sum + (float)totals[d];
    begin_sums(f, totals, out.begin + (b * out.beside + out.in) * P);
    out.unit[b * out.beside + out.in] = unit * f.worth;
    out.sum[b * out.beside + out.in] = sum * unit;
}

// False if the row is not finite, as no digits are that.
template <int BITS, int P>
bool split_row(const Few& f, const float* x, const Digits& out) {
    F nothing = V::zero();
    each_block(f, [&](int64_t b, int64_t k0, int64_t n) {
        F most = V::zero();
        for (int64_t k = 0; k < n; k += TILE) {
            const F v = load_some(x + k0 + k, n - k);
            most = _mm512_max_ps(most, _mm512_abs_ps(v)), nothing = V::fma(v, V::zero(), nothing);
        }
        const float largest = _mm512_reduce_max_ps(most);
        // a power of two above the largest, and a bit to spare for what rounds up to it
        const int exponent = (int)(float_to_bits(largest) >> 23) - 126, shift = 8 * P - 2 - exponent;
        const auto power = [](int e) { return bits_to_float((uint32_t)(127 + e) << 23); };
        if (largest < 1e-30f) split_block<BITS, P>(f, out, b, k0, n, V::zero(), V::zero(), 0, x + k0);  // units would be denormal
        else split_block<BITS, P>(f, out, b, k0, n, V::set1(power(shift / 2)), V::set1(power(shift - shift / 2)), power(-shift), x + k0);
    });
    return _mm512_reduce_add_ps(nothing) == 0;  // 0 times NaN or infinity is not 0
}

template <int BITS>
void order_row(const Few& f, const uint8_t* x, const float* scale, int64_t x_group, const Digits& out) {
    int32_t* to = out.words + out.in * halves(BITS);
    each_block(f, [&](int64_t b, int64_t k0, int64_t n) {
        __m128i sums = _mm_setzero_si128();
        for (int64_t k = 0; k < n; k += TILE) {
            const __mmask16 some = n - k >= TILE ? (__mmask16)~0u : (__mmask16)((1u << (n - k)) - 1);
            const __m128i digits = _mm_xor_si128(_mm_maskz_loadu_epi8(some, x + k0 + k), _mm_maskz_set1_epi8(some, (char)0x80));
            sums = _mm_dpbusd_epi32(sums, _mm_set1_epi8(1), digits);
            place<BITS, 1>({in_order<BITS>(digits)}, k0 + k, least(TILE, n - k), to, out.beside * halves(BITS));
        }
        const int32_t all = total(sums);
        const int64_t at = b * out.beside + out.in;
        begin_sums(f, &all, out.begin + at);
        out.unit[at] = scale[k0 / x_group], out.sum[at] = (float)all * scale[k0 / x_group];
    });
}

}  // namespace
}  // namespace halfbyte

#endif
