// What each instruction set offers, and the arguments of its kernels.
#pragma once
#include "elementwise.h"
#include "matrix.h"

namespace halfbyte {

struct Small {  // a product with few rows of x, as its threads see it
    const Matrix* m = nullptr;
    int rows = 0;                   // of x
    const float* x = nullptr;       // (rows, cols) float32; null where x16 serves
    const uint16_t* x16 = nullptr;  // the same in bfloat16, if it came so
    const float* sums = nullptr;    // (rows, groups): of x over each group; null without zero points
    const float* base = nullptr;    // (rows, groups): what the codes' base (Isa::pair_base) made of x, to be added back
    int planes = 0;                 // digits of each number of x, see few.h; 0: it is not split
    const int8_t* digits = nullptr;  // (rows, planes, cols)
    const int32_t* digit_sums = nullptr;  // (rows, planes, groups): of digits over each group, times minus the middle
    const float* unit = nullptr;          // (rows): worth of the lowest digits
    float center = 0;
    float table[TILE] = {};         // value by code of 4 bits, less the center
    const float* bias = nullptr;    // float32, or null
    Type type = Type::f32;          // of y
    uint8_t* y = nullptr;           // (rows, m->rows)
    int64_t ldy = 0;
};

struct Many {  // a product with many rows, in bfloat16
    const Matrix* m = nullptr;
    int64_t rows = 0;                  // of x, or of dy
    const uint16_t* packed = nullptr;  // x or dy in blocks, see many.h
    const float* bias = nullptr;       // float32, or null
    Type y_type = Type::f32;
    uint8_t* y = nullptr;              // (rows, m->rows), or backward (rows, m->cols)
};

struct Int8 {  // a product of 8-bit x with integers of 4 or 8 bits
    const Matrix* m = nullptr;
    int64_t rows = 0;               // of x
    const int8_t* x = nullptr;      // signed, in the order of int8.h: (rows, cols), or in blocks where there are many rows
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
    // Where bfloat16 x is multiplied as it is: what its decoding adds to every code less the center. Null: x must be float32.
    float (*pair_base)(const Matrix&);
    void (*to_floats)(Type, const uint8_t* x, int64_t n, float* out);
    void (*group_sums)(Type, const uint8_t* x, int64_t groups, int64_t group, float* out);
    void (*dequantize)(const Matrix&, int64_t tile_begin, int64_t tile_end, Type, uint8_t* y);
    float (*split_row)(const Matrix&, const float* x, int planes, int8_t* digits, int32_t* sums);  // null where there are no digits
    void (*small)(const Small&, int64_t tile_begin, int64_t tile_end);
    // Null where there is none, and dequantizing for torch's product serves as well. pack: 16 rows of x (as B: of dy)
    void (*pack)(const uint16_t* x, int64_t rows, int64_t cols, int64_t block, bool as_b, uint16_t* out);
    void (*forward)(const Many&, int64_t tile_begin, int64_t tile_end);
    void (*backward)(const Many&, int64_t column_block_begin, int64_t column_block_end);  // of 16 columns
    void (*few_int8)(const Int8&, int64_t tile_begin, int64_t tile_end);  // null where there is none
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
