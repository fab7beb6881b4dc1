// Blocks of a tensor that is rounded or decoded: reading and writing their numbers, and codes of bits as bytes.
#pragma once
#include "elementwise.h"
#include "simd.h"

namespace halfbyte {
namespace {

// Smallest and largest as maxps has them: of a NaN, the second argument comes through.
inline float above(float least_, float x) { return least_ > x ? least_ : x; }
inline float below(float most, float x) { return most < x ? most : x; }

inline float whole(float x) { return (x + WHOLE) - WHOLE; }  // nearest, ties to even, of what is below 2^22

inline void load(Type t, const uint8_t* p, int64_t n, float* x) {
    if (t == Type::f32) { memcpy(x, p, (size_t)(4 * n)); return; }
    int64_t i = 0;
    if (t == Type::bf16) for (; i + 16 <= n; i += 16) V::store(x + i, V::load_bf16(p + 2 * i));
    if (t == Type::f16) for (; i + 16 <= n; i += 16) V::store(x + i, V::load_f16(p + 2 * i));
    for (; i < n; i++) x[i] = load_float(t, p, i);
}

inline uint16_t rounded_bf16(float f) {  // float_to_bf16 without a branch
    const uint32_t u = float_to_bits(f), r = (u + 0x7fffu + ((u >> 16) & 1)) >> 16;
    return (uint16_t)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : r);
}

inline void store(Type t, const float* x, int64_t n, uint8_t* p) {
    if (t == Type::f32) { memcpy(p, x, (size_t)(4 * n)); return; }
    uint16_t* h = (uint16_t*)p;
    int64_t i = 0;
    if (t == Type::bf16) {
        for (; i < n; i++) h[i] = rounded_bf16(x[i]);
        return;
    }
#if defined(__AVX512F__)
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i*)(h + i), _mm512_cvtps_ph(_mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(h + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT));
#endif
    for (; i < n; i++) h[i] = float_to_f16(x[i]);
}

// Numbers [begin, begin + n) of a part.
inline void load(const Values& v, int64_t begin, int64_t n, float* x) {
    if (v.kind == Values::bytes) for (int64_t i = 0; i < n; i++) x[i] = v.data[begin + i];
    else load(v.type, v.data + begin * size_of(v.type), n, x);
}

// ---- codes of bytes <-> codes of bits, the first in the lowest. Eight fill `bits` bytes.

inline uint64_t squeeze(uint64_t v, int bits) {
    v = (v & 0x00ff00ff00ff00ffull) | (v >> 8 & 0x00ff00ff00ff00ffull) << bits;
    v = (v & 0x0000ffff0000ffffull) | (v >> 16 & 0x0000ffff0000ffffull) << 2 * bits;
    return (v & 0xffffffffull) | v >> 32 << 4 * bits;
}
inline uint64_t spread(uint64_t v, int bits) {
    const uint64_t four = (1ull << 4 * bits) - 1, two = ((1ull << 2 * bits) - 1) * 0x100000001ull, one = ((1ull << bits) - 1) * 0x0001000100010001ull;
    v = (v & four) | (v >> 4 * bits & four) << 32;
    v = (v & two) | (v >> 2 * bits & two) << 16;
    return (v & one) | (v >> bits & one) << 8;
}

#if defined(__AVX512VBMI__)
inline I squeeze(I v, int bits) {
    const auto both = [](I low, I high, int by) { return _mm512_or_si512(low, _mm512_slli_epi64(high, (unsigned)by)); };
    const I bytes = _mm512_set1_epi16(0xff), words = _mm512_set1_epi32(0xffff), halves = _mm512_set1_epi64(0xffffffff);
    v = both(_mm512_and_si512(v, bytes), _mm512_and_si512(_mm512_srli_epi64(v, 8), bytes), bits);
    v = both(_mm512_and_si512(v, words), _mm512_and_si512(_mm512_srli_epi64(v, 16), words), 2 * bits);
    return both(_mm512_and_si512(v, halves), _mm512_srli_epi64(v, 32), 4 * bits);
}
inline I spread(I v, int bits) {
    const auto part = [](I v, int by, I mask, int to) {
        const I high = _mm512_and_si512(_mm512_srli_epi64(v, (unsigned)by), mask);
        return _mm512_or_si512(_mm512_and_si512(v, mask), _mm512_slli_epi64(high, (unsigned)to));
    };
    v = part(v, 4 * bits, _mm512_set1_epi64((1ll << 4 * bits) - 1), 32);
    v = part(v, 2 * bits, _mm512_set1_epi32((1 << 2 * bits) - 1), 16);
    return part(v, bits, _mm512_set1_epi16((short)((1 << bits) - 1)), 8);
}
// Where the `bits` bytes of each eight codes are found: in 8 bytes each, or one after the other.
struct Places {
    alignas(64) uint8_t spread[8][64], together[8][64];
    constexpr Places() : spread(), together() {
        for (int bits = 1; bits < 8; bits++) {
            for (int i = 0; i < 64; i++) {
                spread[bits][i] = (uint8_t)(i / bits % 8 * 8 + i % bits);
                together[bits][i] = (uint8_t)(i / 8 * bits + i % 8);
            }
        }
    }
};
constexpr Places PLACES;
#endif

// codes: room for n and eight more
inline void pack_codes(uint8_t* __restrict codes, int64_t n, int bits, uint8_t* __restrict out) {
    if (bits == 8) { memcpy(out, codes, (size_t)n); return; }
    memset(codes + n, 0, 8);
    int64_t i = 0;
    if (bits == 4) {
#if defined(__AVX512BW__)
        for (; i + 64 <= n; i += 64) {
            const I pairs = _mm512_maddubs_epi16(_mm512_loadu_si512(codes + i), _mm512_set1_epi16(0x1001));
            _mm256_storeu_si256((__m256i*)(out + i / 2), _mm512_cvtepi16_epi8(pairs));
        }
#endif
        for (; i < n; i += 2) out[i / 2] = (uint8_t)(codes[i] | codes[i + 1] << 4);
        return;
    }
#if defined(__AVX512VBMI__)
    const I places = _mm512_load_si512(PLACES.spread[bits]);
    for (; (n - i) * bits >= 512; i += 64, out += 8 * bits) {  // what is too much, the next ones overwrite
        _mm512_storeu_si512(out, _mm512_permutexvar_epi8(places, squeeze(_mm512_loadu_si512(codes + i), bits)));
    }
#endif
    for (; i < n; i += 8, out += bits) {
        uint64_t v;
        memcpy(&v, codes + i, 8);
        v = squeeze(v, bits);
        if ((n - i) * bits >= 64) memcpy(out, &v, 8);
        else memcpy(out, &v, (size_t)least(bits, ceil_div((n - i) * bits, 8)));
    }
}

// codes: room for n and eight more
inline void unpack_codes(const uint8_t* __restrict packed, int64_t n, int bits, uint8_t* __restrict codes) {
    if (bits == 8) { memcpy(codes, packed, (size_t)n); return; }
    int64_t i = 0;
    if (bits == 4) {
        for (; i < n; i += 2) codes[i] = packed[i / 2] & 15, codes[i + 1] = packed[i / 2] >> 4;
        return;
    }
#if defined(__AVX512VBMI__)
    const I places = _mm512_load_si512(PLACES.together[bits]);
    for (; (n - i) * bits >= 512; i += 64, packed += 8 * bits) {
        const I eights = _mm512_maskz_permutexvar_epi8(0x0101010101010101ull * ((1ull << bits) - 1), places, _mm512_loadu_si512(packed));
        _mm512_storeu_si512(codes + i, spread(eights, bits));
    }
#endif
    for (; i < n; i += 8, packed += bits) {
        uint64_t v = 0;
        if ((n - i) * bits >= 64) memcpy(&v, packed, 8);
        else memcpy(&v, packed, (size_t)least(bits, ceil_div((n - i) * bits, 8)));
        v = spread(v & ((1ull << 8 * bits) - 1), bits);
        memcpy(codes + i, &v, 8);
    }
}

// Bytes of 0 or 1 as bits.
inline void pack_mask(uint8_t* inside, int64_t n, uint8_t* out) {
    int64_t i = 0;
#if defined(__AVX2__)
    for (; i + 32 <= n; i += 32) {
        const __m256i bytes = _mm256_loadu_si256((const __m256i*)(inside + i));
        const uint32_t bits = (uint32_t)_mm256_movemask_epi8(_mm256_slli_epi16(bytes, 7));
        memcpy(out + i / 8, &bits, 4);
    }
#endif
    pack_codes(inside + i, n - i, 1, out + i / 8);
}

// ---- blocks

struct Block {  // n elements of the flattened tensor, all in one row, which have scales [group, group + groups)
    int64_t first, n, row, col, group, groups;
    Block(const Elements& e, int64_t b) {
        const int64_t per_row = ceil_div(e.cols, PIECE);
        row = b / per_row, col = (b - row * per_row) * PIECE;
        first = row * e.cols + col, n = least(PIECE, e.cols - col);
        group = first / e.group, groups = (first + n - 1) / e.group - group + 1;
    }
    // Whether each run of elements with one scale is whole vectors.
    bool whole(const Elements& e, int64_t lanes) const { return n % lanes == 0 && (groups == 1 || (e.group % lanes == 0 && first % lanes == 0)); }
    int64_t codes(const Elements& e) const { return row * ceil_div(e.cols * e.grid->bits, 8) + col * e.grid->bits / 8; }

    // each(begin, end, i): elements of the block that have its group number i
    template <class Each> void runs(const Elements& e, Each each) const {
        int64_t end = (group + 1) * e.group - first;
        for (int64_t at = 0, i = 0; at < n; at = end, end += e.group, i++) each(at, least(end, n), i);
    }
};

struct Scales {  // a block's, by the group's number in it
    float divisor[PIECE], scale[PIECE], zero[PIECE];

    void load_divisor(const Elements& e, const Block& b) {
        const int64_t n = b.groups;
        load(e.divisor, b.group, n, divisor);
        // a scale of 0 gives 0
        if (e.multiply) for (int64_t i = 0; i < n; i++) divisor[i] = divisor[i] == 0 ? 0.f : 1 / divisor[i];
        else for (int64_t i = 0; i < n; i++) divisor[i] = divisor[i] == 0 ? __builtin_inff() : divisor[i];
    }
    void load_scale(const Elements& e, const Block& b) { load(e.scale, b.group, b.groups, scale); }
    void load_zero(const Elements& e, const Block& b) {
        if (e.grid->zero != Grid::none) load(e.zero, b.group, b.groups, zero);
    }
};

struct Work {  // what lies between the steps of one block
    alignas(64) float x[PIECE];
    alignas(64) uint8_t codes[PIECE + 64], inside[PIECE + 64];
    Scales s;
};

}  // namespace
}  // namespace halfbyte
