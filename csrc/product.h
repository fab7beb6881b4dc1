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

// dx (rows, m.cols) = dy (rows, m.rows) times m. False where there is no kernel for it.
bool linear_grad(const Matrix& m, Floats dy, int64_t rows, Floats dx, int threads);

}  // namespace halfbyte
