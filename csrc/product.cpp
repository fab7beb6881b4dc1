#include "product.h"

#include "dispatch.h"
#include "threads.h"

namespace halfbyte {
namespace {

constexpr int64_t FEW = 8;  // rows of x up to which reading the codes decides

enum Slot : int { X = 3, BIAS, SUMS, X_SCALE, DIGITS };  // of scratch; those below belong to the kernels

const float* as_floats(Floats v, int64_t n, int slot) {
    if (v.type == Type::f32) return (const float*)v.data;
    float* out = (float*)scratch(slot, (size_t)n * sizeof(float));
    isa().to_floats(v.type, v.data, n, out);
    return out;
}

const int32_t BLOCK = 128;  // neighbours that share a unit: more, and small numbers among them keep too few bits

void place(Few& f, int64_t block) {
    const int64_t bits = f.m->bits, rows = FEW;
    f.block = least(block, f.m->group), f.blocks = f.m->groups * ceil_div(f.m->group, f.block);
    const int64_t words = rows * f.row_words(), begin = rows * f.blocks * f.planes, units = rows * f.blocks;
    f.words = (int32_t*)scratch(DIGITS, (size_t)(words + begin + 2 * units) * 4);
    f.begin = f.words + words, f.unit = (float*)(f.begin + begin), f.sum = f.unit + units;
    f.center = f.m->integers ? (float)(1 << (bits - 1)) - f.m->middle : 0;
}

// A table's values as numbers of 16 bits, by a power of two, and 32768.
void place_table(Few& f) {
    const Matrix& m = *f.m;
    float largest = 0;
    for (int c = 0; c < TILE; c++) largest = largest < m.table[c] ? m.table[c] : largest < -m.table[c] ? -m.table[c] : largest;
    int exponent = 0;
    while (exponent < 30 && largest * (float)(1 << (exponent + 1)) <= 32767) exponent++;
    for (int c = 0; c < TILE; c++) {
        const float scaled = m.table[c] * (float)(1 << exponent);
        const int v = (int)(scaled + (scaled < 0 ? -0.5f : 0.5f)) + 32768;
        f.high[c] = (uint8_t)(v >> 8), f.low[c] = (uint8_t)v;
    }
    f.table = true, f.worth = 256.0f / (float)(1 << exponent);
}

// Few rows of x as digits. False where there are none, or none of x, as it is not finite.
bool few(const Matrix& m, Floats x, int64_t rows, const float* bias, Floats y, int threads) {
    if (!isa().few || (!m.integers && x.type == Type::f32)) return false;  // a table's 16 bits are too few beside float32
    Few f;
    f.m = &m, f.rows = rows, f.planes = x.type == Type::f32 ? 4 : 2;
    f.bias = bias, f.type = y.type, f.y = y.data;
    place(f, BLOCK);
    if (!m.integers) place_table(f);
    if (!isa().split(f, as_floats(x, rows * m.cols, X))) return false;
    parallel(threads, m.tiles(), [&](int64_t begin, int64_t end) { isa().few(f, begin, end); });
    return true;
}

void small(const Matrix& m, Floats x, int64_t rows, const float* bias, Floats y, int threads) {
    Small s;
    s.m = &m, s.rows = (int)rows;
    s.x = as_floats(x, rows * m.cols, X);
    // codes are multiplied less a center: the middle of their range where zero points move them anyway
    if (m.integers) s.center = (float)(1 << (m.bits - 1)) - m.middle;
    if (m.has_zero()) {
        float* sums = (float*)scratch(SUMS, (size_t)(rows * m.groups) * sizeof(float));
        isa().group_sums(s.x, rows * m.groups, m.group, sums);
        s.sums = sums;
    }
    for (int c = 0; c < TILE && m.bits == 4; c++) s.table[c] = m.table[c] - s.center;
    s.bias = bias, s.type = y.type, s.y = y.data;
    parallel(threads, m.tiles(), [&](int64_t begin, int64_t end) { isa().small(s, begin, end); });
}

constexpr int64_t AT_A_TIME = 512, SHALLOW = 4096;  // rows: what one decoding serves, and what scratch must hold

// Whether blocks of x are read where they lie: no padding is needed, and not all rows want the same lines of the cache.
bool readable(int64_t in) { return in % 32 == 0 && in % 1024 != 0; }

void many(const Matrix& m, Floats x, int64_t rows, const float* bias, Floats y, bool back, int threads) {
    const Isa& use = isa();
    const int64_t in = back ? m.rows : m.cols, out = back ? m.cols : m.rows, block_values = ceil_div(in, 32) * 512;
    const int64_t most = in <= 1024 ? SHALLOW : AT_A_TIME;
    for (int64_t row = 0; row < rows; row += most) {
        Many g;
        g.m = &m, g.rows = least(most, rows - row), g.bias = bias;
        g.x = (const uint16_t*)x.data + row * in;
        g.in_place = readable(in) ? g.rows / 32 * 32 : 0;
        g.y_type = y.type, g.y = y.data + row * out * size_of(y.type);
        const int64_t others = ceil_div(g.rows - g.in_place, 16);
        uint16_t* packed = (uint16_t*)scratch(X, (size_t)(others * block_values * 2));
        const uint16_t* from = g.x + g.in_place * in;
        parallel(threads, others, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) use.pack_rows(from, g.rows - g.in_place, in, i, packed + i * block_values);
        });
        g.packed = packed;
        parallel(threads, ceil_div(out, 16), [&](int64_t begin, int64_t end) { (back ? use.backward : use.forward)(g, begin, end); });
    }
}

// A row in the order of int8.h.
void order_row(const Matrix& m, const uint8_t* x, int8_t* out) {
    constexpr int ORDER4[8] = {0, 4, 1, 5, 2, 6, 3, 7}, ORDER8[8] = {0, 2, 1, 3, 4, 6, 5, 7};
    const int* order = m.bits == 4 ? ORDER4 : ORDER8;
    for (int64_t k = 0; k < m.cols; k++) out[k / 64 * 1024 + k % 64] = (int8_t)(x[k / 8 * 8 + order[k % 8]] ^ 0x80);
}

void many_int8(const Matrix& m, const uint8_t* x, const float* x_scale, int64_t x_group, int64_t sub, int64_t rows, const float* bias, Floats y, int threads) {
    Int8 s;
    s.m = &m, s.rows = rows, s.x_group = x_group, s.x_groups = m.cols / x_group, s.sub = sub, s.subs = m.cols / sub, s.middle = 1 << (m.bits - 1);
    s.bias = bias, s.x_scale = x_scale, s.y_type = y.type, s.y = y.data;
    int32_t* sums = (int32_t*)scratch(SUMS, (size_t)(rows * s.subs) * 4);
    const int64_t block_row = ceil_div(m.cols, 64) * 1024;
    int8_t* ordered = (int8_t*)scratch(X, (size_t)(ceil_div(rows, 16) * block_row));
    parallel(threads, rows, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            for (int64_t i = 0; i < s.subs; i++) {
                int32_t total = 0;
                for (int64_t k = 0; k < sub; k++) total += x[r * m.cols + i * sub + k] - 128;
                sums[r * s.subs + i] = total;
            }
            int8_t* to = ordered + r / 16 * block_row + r % 16 * 64;
            if (m.cols % 64) memset(to + m.cols / 64 * 1024, 0, 64);
            order_row(m, x + r * m.cols, to);
        }
    });
    s.x = ordered, s.sums = sums;
    parallel(threads, m.tiles(), [&](int64_t begin, int64_t end) { isa().many_int8(s, begin, end); });
}

}  // namespace

void linear(const Matrix& m, Floats x, int64_t rows, const Floats* bias, Floats y, int threads) {
    const float* b = bias ? as_floats(*bias, m.rows, BIAS) : nullptr;
    if (rows > FEW && x.type == Type::bf16 && isa().forward) return many(m, x, rows, b, y, false, threads);
    for (int64_t row = 0; row < rows; row += FEW) {
        const Floats some{x.type, x.data + row * m.cols * size_of(x.type)}, out{y.type, y.data + row * m.rows * size_of(y.type)};
        if (!few(m, some, least(FEW, rows - row), b, out, threads)) small(m, some, least(FEW, rows - row), b, out, threads);
    }
}

bool linear_int8(const Matrix& m, const uint8_t* x, Floats x_scale, int64_t x_group, int64_t rows, const Floats* bias, Floats y, int threads) {
    const Isa& use = isa();
    const int64_t sub = least(x_group, m.group), word = 32 / m.bits;
    if (!use.few || !m.integers || x_group % sub || m.group % sub || sub % word || m.cols % 8 || m.cols > 65536) return false;
    const float *b = bias ? as_floats(*bias, m.rows, BIAS) : nullptr, *scale = as_floats(x_scale, rows * (m.cols / x_group), X_SCALE);
    if (rows > FEW) return many_int8(m, x, scale, x_group, sub, rows, b, y, threads), true;
    Few f;
    f.m = &m, f.rows = rows, f.planes = 1, f.bias = b, f.type = y.type, f.y = y.data;
    place(f, sub);
    use.order(f, x, scale, x_group);
    parallel(threads, m.tiles(), [&](int64_t begin, int64_t end) { use.few(f, begin, end); });
    return true;
}

void dequantize(const Matrix& m, int64_t tile_begin, int64_t tile_end, Floats y, int threads) {
    uint8_t* first = y.data - tile_begin * TILE * m.cols * size_of(y.type);
    parallel(threads, tile_end - tile_begin, [&](int64_t begin, int64_t end) { isa().dequantize(m, tile_begin + begin, tile_begin + end, y.type, first); });
}

bool linear_grad(const Matrix& m, Floats dy, int64_t rows, Floats dx, int threads) {
    if (dy.type != Type::bf16 || !isa().backward) return false;
    many(m, dy, rows, nullptr, dx, true, threads);
    return true;
}

}  // namespace halfbyte
