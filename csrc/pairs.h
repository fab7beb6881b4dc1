// Codes as pairs of bfloat16: what the dot products of AVX-512 and the matrix unit (AMX) take.
#pragma once
#include "simd.h"

namespace halfbyte {
namespace {

// Of 4-bit integers, of 8-bit ones, and of any 4-bit table.
enum Pairing { INT4, INT8, TABLE4 };

#if defined(__AVX512BF16__)

// Integers need no table: 0x4300 is 128 in bfloat16, and its last four bits count ones, so that code c in them makes
// 128 + c. An 8-bit code is 16 high + low: 128 + low, and 2048 + 16 high. What is over the code less its middle leaves
// again times the sum of x; it costs 5 of float32's 24 bits, of which a bfloat16 x has 8.
// A table is exact as far as a bfloat16 weight is.
constexpr float PAIR_BASE[3] = {128 + 8, 128 + 2048 + 128, 0};

template <Pairing P>
struct Pairs {
    static constexpr int bits = P == INT8 ? 8 : 4;
    __m512i table;
    explicit Pairs(const float* values) {
        uint8_t bytes[64] = {};
        for (int c = 0; P == TABLE4 && c < 16; c++) {
            const uint16_t v = float_to_bf16(values[c]);
            bytes[c] = (uint8_t)v, bytes[c + 16] = (uint8_t)(v >> 8);
        }
        table = _mm512_loadu_si512(bytes);
    }
    // Calls f(Int<n>, pairs) for the four pairs of a word: n of codes 2n and 2n+1; with 8 bits, low and high halves in
    // turn of codes 2(n/2) and 2(n/2)+1.
    template <class Each> void each(I v, Each f) const {
        if constexpr (P == TABLE4) {
            // low and high byte of a value are looked up apart: an index for each from the code's byte, doubled
            const I two0 = _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0e0e0c0c, 0x0a0a0808, 0x06060404, 0x02020000));
            const I two1 = _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0f0f0d0d, 0x0b0b0909, 0x07070505, 0x03030101));
            f(Int<0>{}, pick(two0)), f(Int<1>{}, pick(_mm512_srli_epi16(two0, 4)));
            f(Int<2>{}, pick(two1)), f(Int<3>{}, pick(_mm512_srli_epi16(two1, 4)));
        } else {
            constexpr int odd = P == INT8 ? 0x45004500 : 0x43004300;
            f(Int<0>{}, base(v, 0x43004300)), f(Int<1>{}, base(_mm512_srli_epi32(v, 4), odd));
            f(Int<2>{}, base(_mm512_srli_epi32(v, 8), 0x43004300)), f(Int<3>{}, base(_mm512_srli_epi32(v, 12), odd));
        }
    }
    static constexpr int from(int n) { return P == INT8 ? n / 2 : n; }  // which pair of x goes with pair n

  private:
    I pick(I twice) const {  // (twice & 0x0f0f) | 0x1000
        const I index = _mm512_ternarylogic_epi32(twice, _mm512_set1_epi32(0x0f0f0f0f), _mm512_set1_epi32(0x10001000), 0xea);
        return _mm512_permutexvar_epi8(index, table);
    }
    static I base(I v, int constant) { return _mm512_ternarylogic_epi32(v, _mm512_set1_epi32(0x000f000f), _mm512_set1_epi32(constant), 0xea); }
};

#endif

}  // namespace
}  // namespace halfbyte
