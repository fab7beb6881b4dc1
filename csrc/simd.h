// Sixteen lanes, on each kind of machine. A tile's rows are the lanes, so there are never horizontal sums.
// Everything here is compiled once per instruction set: internal linkage only.
#pragma once
#include "matrix.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace halfbyte {
namespace {

#if defined(__AVX512F__)

struct V {
    using F = __m512;
    using I = __m512i;
    static F zero() { return _mm512_setzero_ps(); }
    static F set1(float x) { return _mm512_set1_ps(x); }
    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F smaller(F a, F b) { return _mm512_min_ps(a, b); }
    static F larger(F a, F b) { return _mm512_max_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F where_above(F x, F bound, F yes, F no) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), no, yes); }
    static F add_where_above(F sum, F x, F bound, F step) { return _mm512_mask_add_ps(sum, _mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), sum, step); }
    static unsigned differ(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_NEQ_OQ); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static I words(const uint8_t* p) { return _mm512_loadu_si512(p); }
    static I words(const uint8_t* p, int n) { return _mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p); }
    static I flip(I v) { return _mm512_xor_si512(v, _mm512_set1_epi32((int)0x80808080u)); }
    template <int n> static F nibble(I v, F table) { return _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * n), table); }
    template <int n> static F byte(I v) { return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(v, 24 - 8 * n), 24)); }
    static F load_bf16(const uint8_t* p) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
    }
    static F load_f16(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
    static F load_bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))); }
    // to nearest, ties to even, by the bits: the instruction for it would flush the smallest to 0. No NaN comes here.
    static __m256i to_bf16(F f) {
        const I u = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, odd), _mm512_set1_epi32(0x7fff)), 16));
    }
    static void store(Type t, uint8_t* p, F f) {
        if (t == Type::f32) return store((float*)p, f);
        _mm256_storeu_si256((__m256i*)p, t == Type::bf16 ? to_bf16(f) : _mm512_cvtps_ph(f, 0));
    }
    static F look_up(const float* table, const uint8_t* p) {
        return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)), table, 4);
    }
    // value i (0 to 7) of the six-bit codes whose low and high halves these are
    static F six_bits(const uint8_t* low, const uint8_t* high, int i) {
        const I l = _mm512_and_si512(_mm512_srlv_epi32(_mm512_loadu_si512(low), _mm512_set1_epi32(4 * i)), _mm512_set1_epi32(15));
        const I h = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
        const I top = _mm512_and_si512(_mm512_srlv_epi32(h, _mm512_set1_epi32(2 * i)), _mm512_set1_epi32(3));
        return _mm512_cvtepi32_ps(_mm512_or_si512(l, _mm512_slli_epi32(top, 4)));
    }
};

#elif defined(__AVX2__)

struct V {
    struct F { __m256 a, b; };
    struct I { __m256i a, b; };
    static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static void store(float* p, F x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
    static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
    static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
    static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
    static F smaller(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
    static F larger(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
    static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
    static __m256 half_where(__m256 x, __m256 bound, __m256 yes, __m256 no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, bound, _CMP_GT_OQ)); }
    static F where_above(F x, F bound, F yes, F no) { return {half_where(x.a, bound.a, yes.a, no.a), half_where(x.b, bound.b, yes.b, no.b)}; }
    static __m256 step_above(__m256 x, __m256 bound, __m256 step) { return _mm256_and_ps(_mm256_cmp_ps(x, bound, _CMP_GT_OQ), step); }
    static F add_where_above(F sum, F x, F bound, F step) { return add(sum, {step_above(x.a, bound.a, step.a), step_above(x.b, bound.b, step.b)}); }
    static unsigned half_differ(__m256 x, __m256 y) { return (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x, y, _CMP_NEQ_OQ)); }
    static unsigned differ(F x, F y) { return half_differ(x.a, y.a) | half_differ(x.b, y.b) << 8; }
    static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
    static I words(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}; }
    static I words(const uint8_t* p, int n) {
        alignas(32) uint8_t w[64] = {};
        memcpy(w, p, (size_t)(4 * n));
        return words(w);
    }
    static I flip(I v) {
        const __m256i m = _mm256_set1_epi32((int)0x80808080u);
        return {_mm256_xor_si256(v.a, m), _mm256_xor_si256(v.b, m)};
    }
    static __m256 pick(__m256i i, F table) {  // of 16 entries: 8 at a time, bit 3 (moved to the sign) chooses
        const __m256 low = _mm256_permutevar8x32_ps(table.a, i), high = _mm256_permutevar8x32_ps(table.b, i);
        return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
    }
    template <int n> static F nibble(I v, F table) {
        return {pick(_mm256_srli_epi32(v.a, 4 * n), table), pick(_mm256_srli_epi32(v.b, 4 * n), table)};
    }
    template <int n> static F byte(I v) {
        return {_mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v.a, 24 - 8 * n), 24)),
                _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v.b, 24 - 8 * n), 24))};
    }
    static __m256 half_bf16(const uint8_t* p) {
        return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
    }
    static F load_bf16(const uint8_t* p) { return {half_bf16(p), half_bf16(p + 16)}; }
    static F load_f16(const uint8_t* p) {
        return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
    }
    static __m128i half_to_bf16(__m256 f) {
        const __m256i u = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
        const __m256i r = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff)), 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1));
    }
    static void store(Type t, uint8_t* p, F f) {
        if (t == Type::f32) return store((float*)p, f);
        _mm_storeu_si128((__m128i*)p, t == Type::bf16 ? half_to_bf16(f.a) : _mm256_cvtps_ph(f.a, 0));
        _mm_storeu_si128((__m128i*)(p + 16), t == Type::bf16 ? half_to_bf16(f.b) : _mm256_cvtps_ph(f.b, 0));
    }
    static __m256i half_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
    static F load_bytes(const uint8_t* p) { return {_mm256_cvtepi32_ps(half_bytes(p)), _mm256_cvtepi32_ps(half_bytes(p + 8))}; }
    static F look_up(const float* table, const uint8_t* p) {
        return {_mm256_i32gather_ps(table, half_bytes(p), 4), _mm256_i32gather_ps(table, half_bytes(p + 8), 4)};
    }
    static __m256 half_six(const uint8_t* low, const uint8_t* high, int i) {
        const __m256i l = _mm256_and_si256(_mm256_srlv_epi32(_mm256_loadu_si256((const __m256i*)low), _mm256_set1_epi32(4 * i)), _mm256_set1_epi32(15));
        const __m256i h = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)high));
        const __m256i top = _mm256_and_si256(_mm256_srlv_epi32(h, _mm256_set1_epi32(2 * i)), _mm256_set1_epi32(3));
        return _mm256_cvtepi32_ps(_mm256_or_si256(l, _mm256_slli_epi32(top, 4)));
    }
    static F six_bits(const uint8_t* low, const uint8_t* high, int i) { return {half_six(low, high, i), half_six(low + 32, high + 16, i)}; }
};

#else

struct V {  // loops that any compiler takes, and most make vectors of
    struct F { float x[16]; };
    struct I { uint32_t x[16]; };
    template <class Each> static F each(Each f) { F r; for (int i = 0; i < 16; i++) r.x[i] = f(i); return r; }
    static F zero() { return set1(0); }
    static F set1(float x) { return each([=](int) { return x; }); }
    static F load(const float* p) { F r; memcpy(r.x, p, 64); return r; }
    static void store(float* p, F x) { memcpy(p, x.x, 64); }
    static F add(F a, F b) { return each([&](int i) { return a.x[i] + b.x[i]; }); }
    static F sub(F a, F b) { return each([&](int i) { return a.x[i] - b.x[i]; }); }
    static F mul(F a, F b) { return each([&](int i) { return a.x[i] * b.x[i]; }); }
    static F smaller(F a, F b) { return each([&](int i) { return a.x[i] < b.x[i] ? a.x[i] : b.x[i]; }); }
    static F larger(F a, F b) { return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; }); }
    static F div(F a, F b) { return each([&](int i) { return a.x[i] / b.x[i]; }); }
    static F where_above(F x, F bound, F yes, F no) { return each([&](int i) { return x.x[i] > bound.x[i] ? yes.x[i] : no.x[i]; }); }
    static F add_where_above(F sum, F x, F bound, F step) { return each([&](int i) { return x.x[i] > bound.x[i] ? sum.x[i] + step.x[i] : sum.x[i]; }); }
    static unsigned differ(F a, F b) { unsigned r = 0; for (int i = 0; i < 16; i++) r |= (unsigned)(a.x[i] < b.x[i] || a.x[i] > b.x[i]) << i; return r; }
    static F fma(F a, F b, F c) { return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; }); }
    static I words(const uint8_t* p) { return words(p, 16); }
    static I words(const uint8_t* p, int n) { I r = {}; memcpy(r.x, p, (size_t)(4 * n)); return r; }
    static I flip(I v) { for (auto& x : v.x) x ^= 0x80808080u; return v; }
    template <int n> static F nibble(const I& v, const F& table) { return each([&](int i) { return table.x[v.x[i] >> (4 * n) & 15]; }); }
    template <int n> static F byte(const I& v) { return each([&](int i) { return (float)(int8_t)(v.x[i] >> (8 * n)); }); }
    static F load_bf16(const uint8_t* p) { return each([=](int i) { return load_float(Type::bf16, p, i); }); }
    static F load_f16(const uint8_t* p) { return each([=](int i) { return load_float(Type::f16, p, i); }); }
    static F load_bytes(const uint8_t* p) { return each([=](int i) { return (float)p[i]; }); }
    static void store(Type t, uint8_t* p, F f) { for (int i = 0; i < 16; i++) store_float(t, p, i, f.x[i]); }
    static F look_up(const float* table, const uint8_t* p) { return each([=](int i) { return table[p[i]]; }); }
    static F six_bits(const uint8_t* low, const uint8_t* high, int n) {
        return each([=](int i) {
            uint32_t l; uint16_t h;
            memcpy(&l, low + 4 * i, 4);
            memcpy(&h, high + 2 * i, 2);
            return (float)((l >> (4 * n) & 15) | (h >> (2 * n) & 3) << 4);
        });
    }
};

#endif

// Reading ahead by hand: too much is done with each word for the machine to see the next ones in time, and its own
// prefetching stops at the end of a page.
constexpr int64_t AHEAD = 4096;
inline void prefetch(const uint8_t* p) { __builtin_prefetch(p + AHEAD, 0, 3); }

template <int n> struct Int { static constexpr int value = n; };

using F = V::F;
using I = V::I;

#if defined(__AVX512F__)
inline F load_some(const float* p, int64_t n) {  // sixteen, or zeros where there are no more
    return n >= TILE ? V::load(p) : _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
#endif

// n floats, plus a bias where it is not null, stored from `at`.
inline void store_row(Type type, uint8_t* y, int64_t at, const float* c, const float* bias, int64_t n) {
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        F f = V::load(c + j);
        if (bias) f = V::add(f, V::load(bias + j));
        V::store(type, y + (at + j) * size_of(type), f);
    }
    for (; j < n; j++) store_float(type, y, at + j, c[j] + (bias ? bias[j] : 0));
}

}  // namespace
}  // namespace halfbyte
