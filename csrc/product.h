// Products with a quantized matrix.
#pragma once
#include "matrix.h"

namespace halfbyte {

struct Floats {  // contiguous
    Type type;
    uint8_t* data;
};

// y (rows, m.rows) = x (rows, m.cols) times m transposed, plus bias (m.rows) where it is not null.
void linear(const Matrix& m, Floats x, int64_t rows, const Floats* bias, Floats y, int threads);

// x in 8-bit codes, 128 standing for 0, with a scale for every x_group neighbours; y, bias as above. False where there
// is no kernel for it: either group must divide the other, and both must hold whole words.
bool linear_int8(const Matrix& m, const uint8_t* x, Floats x_scale, int64_t x_group, int64_t rows, const Floats* bias, Floats y, int threads);

// y: rows of tiles [begin, end), as float32, bfloat16 or float16.
void dequantize(const Matrix& m, int64_t tile_begin, int64_t tile_end, Floats y, int threads);

// dx (rows, m.cols) = dy (rows, m.rows) times m. False where there is no kernel for it.
bool linear_grad(const Matrix& m, Floats dy, int64_t rows, Floats dx, int threads);

}  // namespace halfbyte
