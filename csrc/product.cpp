#include "product.h"

#include "dispatch.h"
#include "threads.h"

namespace halfbyte {
namespace {

constexpr int64_t FEW = 8;  // rows of x up to which reading the codes decides

enum Slot : int { X = 3, BIAS, SUMS, BASE, X_SCALE, DIGITS = X_SCALE };  // of scratch; those below belong to the kernels

const float* as_floats(Floats v, int64_t n, int slot) {
    if (v.type == Type::f32) return (const float*)v.data;
    float* out = (float*)scratch(slot, (size_t)n * sizeof(float));
    isa().to_floats(v.type, v.data, n, out);
    return out;
}

const float* group_sums(const Matrix& m, Floats x, int rows, float factor, int slot) {
    float* sums = (float*)scratch(slot, (size_t)(rows * m.groups) * sizeof(float));
    isa().group_sums(x.type, x.data, rows * m.groups, m.group, sums);
    if (factor != 1) for (int64_t i = 0; i < rows * m.groups; i++) sums[i] *= factor;
    return sums;
}

// Whether digits serve these rows: small groups cost time for each row's digits, so that few rows must share them.
bool splits(const Matrix& m, Floats x, int rows) {
    if (!isa().split_row || !m.integers || m.group % 32 || m.cols > 65536) return false;
    return rows == 1 || m.group >= 256 || (x.type == Type::f32 ? rows <= 2 || m.group >= 128 : rows <= 4 && m.group >= 128);
}

// Gives false, and changes nothing, if x is not finite.
bool split_rows(const Matrix& m, Small& s, int planes) {
    const int64_t digits_size = s.rows * planes * m.cols, sums_size = s.rows * planes * m.groups * 4;
    uint8_t* memory = scratch(DIGITS, (size_t)(ceil_div(digits_size, 64) * 64 + sums_size) + FEW * sizeof(float));
    int8_t* digits = (int8_t*)memory;
    int32_t* sums = (int32_t*)(memory + ceil_div(digits_size, 64) * 64);
    float* unit = (float*)((uint8_t*)sums + sums_size);
    for (int r = 0; r < s.rows; r++) {
        unit[r] = isa().split_row(m, s.x + r * m.cols, planes, digits + r * planes * m.cols, sums + r * planes * m.groups);
        if (unit[r] < 0) return false;
    }
    s.planes = planes, s.digits = digits, s.digit_sums = sums, s.unit = unit;
    return true;
}

void few(const Matrix& m, Floats x, int rows, const float* bias, Floats y, int threads) {
    Small s;
    s.m = &m;
    s.rows = rows;
    const Isa& use = isa();
    // codes are multiplied less a center: the middle of their range where zero points move them anyway
    if (m.integers) s.center = (float)(1 << (m.bits - 1)) - m.middle;
    bool split = false;
    if (splits(m, x, rows)) {
        s.x = as_floats(x, rows * m.cols, X);
        split = split_rows(m, s, x.type == Type::f32 ? 4 : 3);
    }
    if (!split && x.type == Type::bf16 && use.pair_base) {
        s.x16 = (const uint16_t*)x.data, s.x = nullptr;
        if (use.pair_base(m) != 0) s.base = group_sums(m, x, rows, -use.pair_base(m), BASE);
    } else if (!s.x) {
        s.x = as_floats(x, rows * m.cols, X);
    }
    if (m.has_zero()) s.sums = group_sums(m, x, rows, 1, SUMS);
    for (int c = 0; c < TILE && m.bits == 4; c++) s.table[c] = m.table[c] - s.center;
    s.bias = bias;
    s.type = y.type;
    s.y = y.data;
    s.ldy = m.rows;
    parallel(threads, m.tiles(), [&](int64_t begin, int64_t end) { use.small(s, begin, end); });
}

constexpr int64_t AT_A_TIME = 512, SHALLOW = 4096;  // rows: what one decoding serves, and what scratch must hold

void many(const Matrix& m, Floats x, int64_t rows, const float* bias, Floats y, bool back, int threads) {
    const Isa& use = isa();
    const int64_t in = back ? m.rows : m.cols, out = back ? m.cols : m.rows, block_values = ceil_div(in, 32) * 512;
    const int64_t most = in <= 1024 ? SHALLOW : AT_A_TIME;
    uint16_t* packed = (uint16_t*)scratch(X, (size_t)(ceil_div(least(rows, most), 16) * block_values * 2));
    for (int64_t row = 0; row < rows; row += most) {
        Many g;
        g.m = &m, g.rows = least(most, rows - row), g.packed = packed, g.bias = bias;
        g.y_type = y.type, g.y = y.data + row * out * size_of(y.type);
        const uint16_t* from = (const uint16_t*)x.data + row * in;
        parallel(threads, ceil_div(g.rows, 16), [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) use.pack(from, g.rows, in, i, back, packed + i * block_values);
        });
        if (back) parallel(threads, ceil_div(m.cols, 16), [&](int64_t begin, int64_t end) { use.backward(g, begin, end); });
        else parallel(threads, m.tiles(), [&](int64_t begin, int64_t end) { use.forward(g, begin, end); });
    }
}

// The order of int8.h, of one row; `blocks` apart by 1 KB where rows stand in blocks, else as they follow.
void order_row(const Matrix& m, const uint8_t* x, int8_t* out, bool in_blocks) {
    constexpr int ORDER4[8] = {0, 4, 1, 5, 2, 6, 3, 7}, ORDER8[8] = {0, 2, 1, 3, 4, 6, 5, 7};
    const int* order = m.bits == 4 ? ORDER4 : ORDER8;
    for (int64_t k = 0; k < m.cols; k++) {
        const int64_t from = k / 8 * 8 + order[k % 8];
        out[in_blocks ? k / 64 * 1024 + k % 64 : k] = (int8_t)(x[from] ^ 0x80);
    }
}

}  // namespace

void linear(const Matrix& m, Floats x, int64_t rows, const Floats* bias, Floats y, int threads) {
    const float* b = bias ? as_floats(*bias, m.rows, BIAS) : nullptr;
    if (rows > FEW && x.type == Type::bf16 && isa().forward) return many(m, x, rows, b, y, false, threads);
    for (int64_t row = 0; row < rows; row += FEW) {
        few(m, {x.type, x.data + row * m.cols * size_of(x.type)}, (int)least(FEW, rows - row), b,
            {y.type, y.data + row * m.rows * size_of(y.type)}, threads);
    }
}

bool linear_int8(const Matrix& m, const uint8_t* x, Floats x_scale, int64_t x_group, int64_t rows, const Floats* bias, Floats y, int threads) {
    const Isa& use = isa();
    const int64_t sub = least(x_group, m.group), word = 32 / m.bits;
    if (!use.few_int8 || !m.integers || x_group % sub || m.group % sub || sub % word || m.cols % 8 || m.cols > 65536) return false;
    Int8 s;
    s.m = &m, s.rows = rows, s.x_group = x_group, s.x_groups = m.cols / x_group, s.sub = sub, s.subs = m.cols / sub, s.middle = 1 << (m.bits - 1);
    s.bias = bias ? as_floats(*bias, m.rows, BIAS) : nullptr;
    s.x_scale = as_floats(x_scale, rows * s.x_groups, X_SCALE);
    s.y_type = y.type, s.y = y.data;
    int32_t* sums = (int32_t*)scratch(SUMS, (size_t)(rows * s.subs) * 4);
    const bool blocks = rows > FEW;
    const int64_t block_row = ceil_div(m.cols, 64) * 1024;
    int8_t* ordered = (int8_t*)scratch(X, (size_t)(blocks ? ceil_div(rows, 16) * block_row : rows * m.cols));
    const auto prepare = [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; r++) {
            for (int64_t i = 0; i < s.subs; i++) {
                int32_t total = 0;
                for (int64_t k = 0; k < sub; k++) total += x[r * m.cols + i * sub + k] - 128;
                sums[r * s.subs + i] = total;
            }
            if (!blocks) {
                order_row(m, x + r * m.cols, ordered + r * m.cols, false);
                continue;
            }
            int8_t* to = ordered + r / 16 * block_row + r % 16 * 64;
            if (m.cols % 64) memset(to + m.cols / 64 * 1024, 0, 64);
            order_row(m, x + r * m.cols, to, true);
        }
    };
    parallel(blocks ? threads : 1, rows, prepare);
    s.x = ordered, s.sums = sums;
    parallel(threads, m.tiles(), [&](int64_t begin, int64_t end) { blocks ? use.many_int8(s, begin, end) : use.few_int8(s, begin, end); });
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
