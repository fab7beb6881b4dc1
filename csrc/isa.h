// What each instruction set offers, and the arguments of its kernels.
#pragma once
#include "elementwise.h"
#include "matrix.h"

namespace halfbyte {

struct Few {  // a product with few rows of x in digits (digits.h), or with 8-bit ones (planes = 1)
    const Matrix* m = nullptr;
    int64_t rows = 0;              // of x
    int planes = 0;                // digits of a number
    int64_t block = 0, blocks = 0;  // neighbours, inside a group, that share a unit; and how many such a row has
    int32_t *words = nullptr, *begin = nullptr;  // what digits.h makes of x: words of digits, sums to begin with,
    float *unit = nullptr, *sum = nullptr;       // blocks' units, and x summed over blocks
    float center = 0;
    bool table = false;                  // codes stand for 16-bit numbers, here by their bytes; one is worth `worth` / 256
    uint8_t high[TILE] = {}, low[TILE] = {};
    float worth = 1;
    const float* bias = nullptr;  // float32, or null
    Type type = Type::f32;        // of y
    uint8_t* y = nullptr;         // (rows, m->rows)

    int64_t row_words() const { return m->cols / 4 * planes; }
    int64_t beside(int64_t row) const { return rows - row > 2 ? 4 : rows - row; }  // rows taken together; 3 as 4
};

struct Small {  // the same in float32, where there are no digits
    const Matrix* m = nullptr;
    int rows = 0;                // of x
    const float* x = nullptr;    // (rows, cols) float32
    const float* sums = nullptr;  // (rows, groups): of x over each group; null without zero points
    float center = 0;
    float table[TILE] = {};      // value by code of 4 bits, less the center
    const float* bias = nullptr;  // float32, or null
    Type type = Type::f32;       // of y
    uint8_t* y = nullptr;        // (rows, m->rows)
};

struct Many {  // a product with many rows, in bfloat16
    const Matrix* m = nullptr;
    int64_t rows = 0;                  // of x, or of dy
    const uint16_t* x = nullptr;       // or dy: bfloat16, (rows, in)
    int64_t in_place = 0;              // rows, 32 and 32, that are read where they lie
    const uint16_t* packed = nullptr;  // the others, in blocks; see many.h
    const float* bias = nullptr;       // float32, or null
    Type y_type = Type::f32;
    uint8_t* y = nullptr;              // (rows, m->rows), or backward (rows, m->cols)
};

struct Int8 {  // a product of many rows of 8-bit x with integers of 4 or 8 bits
    const Matrix* m = nullptr;
    int64_t rows = 0;               // of x
    const int8_t* x = nullptr;      // signed, in the order of int8.h
    int64_t x_group = 0, x_groups = 0;
    const float* x_scale = nullptr;  // (rows, x_groups)
    int64_t sub = 0, subs = 0;       // neighbours that share both scales, and how many such there are in a row
    const int32_t* sums = nullptr;   // (rows, subs): of x
    int32_t middle = 0;              // of the unsigned codes' range
    const float* bias = nullptr;     // float32, or null
    Type y_type = Type::f32;
    uint8_t* y = nullptr;            // (rows, m->rows)
};

struct Isa {
    const char* name;
    void (*to_floats)(Type, const uint8_t* x, int64_t n, float* out);
    void (*group_sums)(const float* x, int64_t groups, int64_t group, float* out);
    void (*dequantize)(const Matrix&, int64_t tile_begin, int64_t tile_end, Type, uint8_t* y);
    void (*small)(const Small&, int64_t tile_begin, int64_t tile_end);
    // Null where x is not split into digits. split: rows of float32; false if one is not finite. order: rows of 8-bit
    // codes, 128 standing for 0, which are digits, with a scale for every x_group neighbours.
    bool (*split)(const Few&, const float* x);
    void (*order)(const Few&, const uint8_t* x, const float* scale, int64_t x_group);
    void (*few)(const Few&, int64_t tile_begin, int64_t tile_end);
    // Null where there is none, and dequantizing for torch's product serves as well. Both ways
    // for columns of y, 16 and 16.
    void (*pack_rows)(const uint16_t* x, int64_t rows, int64_t cols, int64_t block, uint16_t* out);
    void (*forward)(const Many&, int64_t block_begin, int64_t block_end);
    void (*backward)(const Many&, int64_t block_begin, int64_t block_end);
    void (*many_int8)(const Int8&, int64_t tile_begin, int64_t tile_end);
    Elementwise elementwise;
};

const Isa* isa_generic();
const Isa* isa_avx2();
const Isa* isa_avx512();
const Isa* isa_amx();

// Aligned memory of the calling thread that stays for its next call; slots do not overlap.
uint8_t* scratch(int slot, size_t bytes);

}  // namespace halfbyte
