// A quantized matrix as the kernels see it: bytes, and what they mean. Mirrors QTensor and Format.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace halfbyte {

constexpr int TILE = 16;  // rows of a tile: one fp32 vector register of the widest machine

enum class Type : int { f32, bf16, f16, e8m0 };

static inline int64_t size_of(Type t) { return t == Type::f32 ? 4 : t == Type::e8m0 ? 1 : 2; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A (rows, groups) matrix of scales or zero points: floats, integers of a byte, or codes of a table whose values are
// multiplied by an inner scale (double quantization, super-blocks).
struct Values {
    enum Kind : int { none, floats, bytes, nested } kind = none;
    Type type = Type::f32;         // floats: how they are stored; nested: how the inner scale is
    const uint8_t* data = nullptr;
    int bits = 8;                  // nested: 6 or 8
    const uint8_t* inner = nullptr;
    int64_t inner_group = 1;       // neighbours, over the flattened codes, that share an inner scale
    float offset = 0;
    float table[256] = {};

    int64_t inner_of(int64_t i) const { return (inner_group & (inner_group - 1)) == 0 ? i >> __builtin_ctzll((uint64_t)inner_group) : i / inner_group; }
};

// value = scale * (table[code] - zero), or scale * table[code] + zero with a float zero.
struct Matrix {
    int64_t rows = 0, cols = 0;
    int bits = 4;
    int64_t group = 0;    // neighbours along a row that share a scale
    int64_t groups = 0;   // a row's
    bool tiled = false;
    bool integers = false;  // table[c] == c - middle
    float middle = 0;
    bool zero_added = false;
    const uint8_t* codes = nullptr;
    Values scale, zero;
    float table[256] = {};

    int64_t row_bytes() const { return ceil_div(cols * bits, 8); }
    int64_t tiles() const { return ceil_div(rows, TILE); }
    int tile_rows(int64_t t) const { return (int)least(TILE, rows - t * TILE); }
    const uint8_t* tile(int64_t t) const { return codes + t * TILE * row_bytes(); }
    bool has_zero() const { return zero.kind != Values::none; }
};

static inline float bits_to_float(uint32_t u) { float f; memcpy(&f, &u, 4); return f; }
static inline uint32_t float_to_bits(float f) { uint32_t u; memcpy(&u, &f, 4); return u; }
static inline float bf16_to_float(uint16_t b) { return bits_to_float((uint32_t)b << 16); }

static inline uint16_t float_to_bf16(float f) {  // to nearest, ties to even, as IEEE and torch do
    uint32_t u = float_to_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, e = (h >> 10) & 31, m = h & 0x3ff;
    if (e == 31) return bits_to_float(sign | 0x7f800000u | m << 13);
    if (e) return bits_to_float(sign | (e + 112) << 23 | m << 13);
    float f = (float)m * 5.9604644775390625e-08f;  // 2^-24
    return sign ? -f : f;
}

static inline uint16_t float_to_f16(float f) {
    uint32_t u = float_to_bits(f), sign = u >> 16 & 0x8000;
    u &= 0x7fffffffu;
    if (u > 0x7f800000u) return (uint16_t)(sign | 0x7e00);
    if (u >= 0x47800000u) return (uint16_t)(sign | 0x7c00);  // 2^16 and above; what rounds up to it, below
    if (u < 0x38800000u) {                                    // below 2^-14: the addition rounds to a multiple of 2^-24
        return (uint16_t)(sign | (float_to_bits(bits_to_float(u) + 0.5f) - 0x3f000000u));
    }
    return (uint16_t)(sign | (u - 0x38000000u + 0xfffu + ((u >> 13) & 1)) >> 13);
}

static inline float e8m0_to_float(uint8_t b) {
    return b == 255 ? bits_to_float(0x7fc00000u) : bits_to_float(b ? (uint32_t)b << 23 : 0x00400000u);
}

static inline float load_float(Type t, const uint8_t* p, int64_t i) {
    uint16_t h;
    switch (t) {
        case Type::f32: { float f; memcpy(&f, p + 4 * i, 4); return f; }
        case Type::bf16: memcpy(&h, p + 2 * i, 2); return bf16_to_float(h);
        case Type::f16: memcpy(&h, p + 2 * i, 2); return f16_to_float(h);
        default: return e8m0_to_float(p[i]);
    }
}

static inline void store_float(Type t, uint8_t* p, int64_t i, float f) {
    uint16_t h;
    if (t == Type::f32) { memcpy(p + 4 * i, &f, 4); return; }
    h = t == Type::bf16 ? float_to_bf16(f) : float_to_f16(f);
    memcpy(p + 2 * i, &h, 2);
}

}  // namespace halfbyte
