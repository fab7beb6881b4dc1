// Rounding to a grid and back, element by element: what the kernels of each instruction set are given, and the drivers
// that split it over threads. Mirrors formats.Grid and formats.Format.
#pragma once
#include "matrix.h"

namespace halfbyte {

constexpr int64_t PIECE = 2048;  // elements of a block: so many that what lies between two steps stays in the first cache
constexpr int64_t LATTICE = 1 << 16;

struct Grid {
    enum Kind : int { integers, table, float8 } kind = integers;
    enum Zero : int { none, integer, added } zero = none;
    int bits = 8;
    float middle = 0, top = 0;          // integers: what is taken off a code (without an integer zero); the highest code
    float low = 0, high = 0;            // tables, floats: the ends of what is not clipped
    int mantissa = 0;                   // floats: bits of it
    int steps = 4;                      // tables: of the search in 2^steps - 1 bounds, which are filled up with infinity
    float bounds[256] = {};             // a number above `rank` of them
    uint8_t order[256] = {};            // has this code; by rank
    bool cells = false;                 // of up to 16 values: 32 equal cells of the range have a bound at most, see make_cells
    float cell_step = 0, cell_start = 0;
    float cell_bound[32] = {};          // it, or infinity
    uint16_t cell_rank[32] = {};        // the bounds in lower cells
    const uint8_t* lattice = nullptr;   // (LATTICE,) codes of the points that numbers are moved to first, or null
    float values[256] = {};             // by code, before the scale; of integers less the middle
};

constexpr float WHOLE = 12582912.f;  // 1.5 * 2^23: floats of its magnitude are the whole numbers

// Fills in a table's cells. The cell of x is round(x * cell_step + cell_start) - WHOLE, between 0 and 31.
void make_cells(Grid& g);

// A tensor and its parts, of which each job uses some. Element i of the flattened tensor has scale i / group.
struct Elements {
    const Grid* grid = nullptr;
    int64_t rows = 0, cols = 0;    // each row's codes begin a byte
    int64_t group = 1;
    Type type = Type::f32;         // of x and out
    const uint8_t* x = nullptr;
    uint8_t* out = nullptr;
    Values divisor;                // the scale that is rounded with
    Values scale, zero;            // those that codes are decoded with; the zero rounds, too
    bool multiply = false;         // by the inverse, where every one of a table's is finite (bitsandbytes' arithmetic)
    bool has_offset = false;
    float offset = 0;              // added to each value at the end
    const uint8_t* codes = nullptr;
    uint8_t* codes_out = nullptr;
    uint8_t* mask = nullptr;       // a bit an element: whether it lay inside the grid's range
    const uint8_t* mask_in = nullptr;
};

static inline int64_t blocks_of(const Elements& e) { return e.rows * ceil_div(e.cols, PIECE); }

// Where scales come from: the range of each group.
struct Search {
    enum How : int { extreme, magnitude, range } how = extreme;
    Type type = Type::f32;
    const uint8_t* x = nullptr;
    int64_t n = 0, group = 1;
    float side = 1;                // what the extreme or the magnitude is divided by; of a range, the highest code
    bool widen = false;            // a range holds 0
    Grid::Zero zero = Grid::none;  // of a range
    bool keep_zero = false;        // a scale of 0 stays
    float *scale = nullptr, *zero_out = nullptr;
};

// Where scales come from: the least squared error of each group (fit.h).
struct Fit {
    enum Weigh : int { alike, size } weigh = alike;  // what each squared error is multiplied by: 1, or |x|
    const Grid* grid = nullptr;    // integers, or a table whose neighbours' differences are exact
    Type type = Type::f32;
    const uint8_t* x = nullptr;
    int64_t n = 0, group = 1;      // whole groups
    const float* importance = nullptr;  // (cols,), by input, or null
    int64_t cols = 0;
    bool widen = false, negative = false, keep_zero = false;  // a range holds 0; an added zero is not above 0; as in Search
    bool both_signs = false;       // a scale may turn the grid round
    int ratios = 0;
    float ratio[32] = {};          // of the range, that are tried
    float steps[256] = {};         // of a table: between its values, by rank
    float first = 0;
    int values = 0;
    float *scale = nullptr, *zero = nullptr;  // by group; by super-block, its factors (of minima: negative)
    // super-blocks of `together` groups, whose scales and minima are integers of the inner grid
    int64_t together = 0;
    const Grid* inner = nullptr;
    uint8_t *scale_codes = nullptr, *zero_codes = nullptr;
};

// Rounding that minimizes a quadratic form of its errors (solve.h).
struct Solve {
    const Grid* grid = nullptr;    // integers or a table
    int64_t rows = 0, cols = 0, groups = 0;
    const float* w = nullptr;      // (rows, cols): what is rounded in order
    float* gradient = nullptr;     // (rows, cols): (q - w) H of the codes that are there, for passes over them
    const float* m = nullptr;      // (cols, cols): H, or the lower Cholesky factor of its inverse
    const int32_t* group = nullptr;  // (cols,): whose scale a column has
    const float *scale = nullptr, *zero = nullptr;  // (rows, groups)
    uint8_t* codes = nullptr;      // (rows, cols), a byte each
    int passes = 0;                // over codes that are there; 0: the columns are rounded in order
};

struct Elementwise {
    void (*quantize)(const Elements&, int64_t block_begin, int64_t block_end);
    void (*dequantize)(const Elements&, int64_t block_begin, int64_t block_end);
    void (*fake)(const Elements&, int64_t block_begin, int64_t block_end);
    void (*fake_grad)(const Elements&, int64_t block_begin, int64_t block_end);
    bool (*invertible)(const Values&, int64_t begin, int64_t end);  // whether 1 / v is finite for all that are not 0
    // low and high of x[begin, end); how == magnitude: high only. False where it holds NaN or infinity.
    bool (*range)(const Search&, int64_t begin, int64_t end, float* low, float* high);
    bool (*ranges)(const Search&, int64_t group_begin, int64_t group_end);  // of whole groups, to scale and zero
    void (*settle)(const Search&, const float* low, const float* high, int64_t group_begin, int64_t group_end);  // the last step of both
    bool (*fit_groups)(const Fit&, int64_t group_begin, int64_t group_end);
    bool (*fit_supers)(const Fit&, int64_t block_begin, int64_t block_end);
    void (*solve)(const Solve&, int64_t tile_begin, int64_t tile_end);
};

void quantize(Elements e, int threads);
void dequantize(const Elements& e, int threads);
void fake(Elements e, int threads);
void fake_grad(const Elements& e, int threads);
bool fit(const Fit& f, int threads);       // the same
bool search(const Search& s, int threads);  // false where x holds NaN or infinity
void solve(const Solve& s, int threads);

}  // namespace halfbyte
