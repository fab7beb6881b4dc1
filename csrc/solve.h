// Rounding that minimizes a quadratic form of its errors, (w - q) H (w - q)^T, each row by itself: a column after the
// other is rounded, and what that changes is passed on: at once to its neighbours in a span of columns, to all others when
// the span is done, so that each of their numbers is loaded once for all of the span.
#pragma once
#include "elementwise.h"
#include "simd.h"

namespace halfbyte {
namespace {

constexpr int64_t SPAN = 64, AT_ONCE = 8;

inline float smaller(float a, float b) { return a < b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }

// The code that a number gets, of a grid whose scale and zero point are w * inverse + shift.
inline int code_of(const Grid& g, float w, float inverse, float shift) {
    const float x = w * inverse + shift;
    if (g.kind == Grid::integers) return (int)((larger(0, smaller(g.top, x)) + WHOLE) - WHOLE);
    int low = 0, high = (1 << g.steps) - 1;  // the number of bounds below x
    while (low < high) {
        const int mid = (low + high) / 2;
        if (g.bounds[mid] < x) low = mid + 1;
        else high = mid;
    }
    return g.order[low];
}

// A group's scale s and zero point as they are used: code = w * inverse + shift, value = s * code + offset; of tables neither
// shift nor offset.
struct Numbers {
    float scale = 0, inverse = 0, shift = 0, offset = 0;
    Numbers() = default;
    Numbers(const Solve& s, int64_t row, int64_t group) {
        const int64_t at = row * s.groups + group;
        scale = s.scale[at], inverse = scale == 0 ? 0 : 1 / scale;
        if (s.grid->kind != Grid::integers) return;
        const float z = s.zero ? s.zero[at] : s.grid->middle;
        const bool added = s.grid->zero == Grid::added;
        shift = added ? -z * inverse : z, offset = added ? z : -z * scale;
    }
    float value(const Grid& g, int code) const { return g.kind == Grid::integers ? scale * (float)code + offset : scale * g.values[code]; }
};

// GPTQ: sixteen rows, which are the lanes, each column's error made good by those that follow. m: the lower Cholesky factor of
// the inverse of H.
struct Strip {
    const Solve& s;
    int64_t first, n;  // its first row, its rows
    int64_t changed = 0, column[SPAN];  // of the present span
    float change[SPAN * TILE];
    float *numbers, *codes;  // (cols, TILE): what is to be rounded, what was chosen
    Numbers* known;          // (groups, TILE)

    Strip(const Solve& solve, int64_t row) : s(solve), first(row), n(least(TILE, solve.rows - row)) {
        numbers = (float*)scratch(0, (size_t)(2 * s.cols * TILE) * sizeof(float)), codes = numbers + s.cols * TILE;
        known = (Numbers*)scratch(1, (size_t)(s.groups * TILE) * sizeof(Numbers));
        for (int64_t g = 0; g < s.groups; g++) for (int64_t i = 0; i < TILE; i++) known[g * TILE + i] = i < n ? Numbers(s, first + i, g) : Numbers();
    }

    // What changed goes to the columns from..to: each of their numbers less the change times how far it reaches, m (k, j).
    void pass_on(int64_t from, int64_t to) const {
        int64_t k = from;
        for (; k + AT_ONCE <= to; k += AT_ONCE) pass_on<AT_ONCE>(k);
        for (; k < to; k++) pass_on<1>(k);
    }
    template <int64_t many> void pass_on(int64_t k) const {
        V::F sum[many];
        for (int64_t i = 0; i < many; i++) sum[i] = V::load(numbers + (k + i) * TILE);
        for (int64_t c = 0; c < changed; c++) {
            const V::F less = V::sub(V::zero(), V::load(change + c * TILE));
            const float* m = s.m + k * s.cols + column[c];
            for (int64_t i = 0; i < many; i++) sum[i] = V::fma(less, V::set1(m[i * s.cols]), sum[i]);
        }
        for (int64_t i = 0; i < many; i++) V::store(numbers + (k + i) * TILE, sum[i]);
    }
    // The last change alone, to the columns from..to.
    void pass_last_on(int64_t from, int64_t to) const {
        const V::F less = V::sub(V::zero(), V::load(change + (changed - 1) * TILE));
        const float* m = s.m + column[changed - 1];
        for (int64_t k = from; k < to; k++) V::store(numbers + k * TILE, V::fma(less, V::set1(m[k * s.cols]), V::load(numbers + k * TILE)));
    }
    void run() {
        for (int64_t j = 0; j < s.cols; j++) for (int64_t i = 0; i < TILE; i++) numbers[j * TILE + i] = i < n ? s.w[(first + i) * s.cols + j] : 0;
        for (int64_t begin = 0; begin < s.cols; begin += SPAN) {
            const int64_t end = least(begin + SPAN, s.cols);
            changed = 0;
            for (int64_t j = begin; j < end; j++) {
                const Numbers* own = known + (int64_t)s.group[j] * TILE;
                float* error = change + changed * TILE;
                for (int64_t i = 0; i < TILE; i++) {
                    const float w = numbers[j * TILE + i];
                    const int c = code_of(*s.grid, w, own[i].inverse, own[i].shift);
                    codes[j * TILE + i] = (float)c, error[i] = (w - own[i].value(*s.grid, c)) / s.m[j * s.cols + j];
                }
                column[changed++] = j;
                pass_last_on(j + 1, end);
            }
            pass_on(end, s.cols);
        }
    }
    void keep() const {
        for (int64_t i = 0; i < n; i++) for (int64_t j = 0; j < s.cols; j++) s.codes[(first + i) * s.cols + j] = (uint8_t)codes[j * TILE + i];
    }
};

// Coordinate descent: each code to the best there is while the row's others stay, columns in turn, as often as one still
// changes. m: H. Columns are the lanes. Few codes change, so a change is passed on by itself, and rows go through a span of
// columns together, so that the part of H which they need stays near.
struct Descent {
    static constexpr int64_t ROWS = 64, REACH = 8 * TILE;  // rows together; columns that a row's changes are passed on to at a time
    const Solve& s;
    const int64_t first, n, wide;  // its first row, its rows, columns with those that fill up the last lanes
    float *gradient, *step;        // (rows, wide) of (w - q) H (w - q)^T, halved; (wide,) the inverse of H's diagonal
    uint8_t* codes;                // (rows, wide)
    Numbers* known;                // (rows, groups)
    int64_t changed[ROWS], column[ROWS][SPAN];
    float change[ROWS][SPAN];      // by how much less a column is worth now

    Descent(const Solve& solve, int64_t row, int64_t rows) : s(solve), first(row), n(rows), wide(ceil_div(solve.cols, TILE) * TILE) {
        gradient = (float*)scratch(0, (size_t)((n + 1) * wide) * sizeof(float)), step = gradient + n * wide;
        codes = scratch(1, (size_t)(n * wide)), known = (Numbers*)scratch(2, (size_t)(n * s.groups) * sizeof(Numbers));
        for (int64_t j = 0; j < wide; j++) {
            const float own = j < s.cols ? s.m[j * s.cols + j] : 0;
            step[j] = own > 0 ? 1 / own : 0;
        }
        for (int64_t r = 0; r < n; r++) {
            for (int64_t j = 0; j < wide; j++) {
                const int64_t at = (first + r) * s.cols + j;
                gradient[r * wide + j] = j < s.cols ? s.gradient[at] : 0, codes[r * wide + j] = j < s.cols ? s.codes[at] : 0;
            }
            for (int64_t g = 0; g < s.groups; g++) known[r * s.groups + g] = Numbers(s, first + r, g);
        }
    }
    void run() {
        bool moving[ROWS];
        for (auto& m : moving) m = true;
        bool again = true;
        for (int pass = 0; pass < s.passes && again; pass++) {
            bool moved[ROWS] = {};
            for (int64_t begin = 0; begin < s.cols; begin += SPAN) {
                const int64_t end = least(begin + SPAN, s.cols);
                int64_t most = 0;
                for (int64_t r = 0; r < n; r++) {
                    changed[r] = 0;
                    if (moving[r]) within(r, begin, end);
                    moved[r] |= changed[r] > 0, most += changed[r];
                }
                if (most) pass_on(0, begin), pass_on(end, s.cols);
            }
            again = false;
            for (int64_t r = 0; r < n; r++) again |= moving[r] = moved[r];
        }
        for (int64_t r = 0; r < n; r++) {
            memcpy(s.codes + (first + r) * s.cols, codes + r * wide, (size_t)s.cols);
            memcpy(s.gradient + (first + r) * s.cols, gradient + r * wide, (size_t)s.cols * sizeof(float));
        }
    }
    // Moves the codes of a row's columns begin..end, which are whole lanes but for the last ones of all.
    void within(int64_t r, int64_t begin, int64_t end) {
        for (int64_t j = begin; j < end; j += TILE) {
            unsigned left = end - j < TILE ? (1u << (end - j)) - 1 : 0xffffu;  // those that come yet
            while (left) {
                float less[TILE];
                uint8_t now[TILE];
                const unsigned differ = better(r, j, left, less, now);
                if (!differ) break;
                const int i = __builtin_ctz(differ);
                codes[r * wide + j + i] = now[i];
                column[r][changed[r]] = j + i, change[r][changed[r]++] = less[i];
                pass_on(r, changed[r] - 1, begin, end);
                left &= ~1u << i;
            }
        }
    }
    // Which of the lanes at column j are worth more with other codes, these codes, and how much less they stand for then.
    unsigned better(int64_t r, int64_t j, unsigned lanes, float* less, uint8_t* now) const {
        const Grid& grid = *s.grid;
        const Numbers* own = known + r * s.groups;
        const float* g = gradient + r * wide + j;
        const uint8_t* was = codes + r * wide + j;
        if (grid.kind == Grid::integers && j + TILE <= s.cols && s.group[j] == s.group[j + TILE - 1]) {
            const Numbers& k = own[s.group[j]];
            const F scale = V::set1(k.scale), offset = V::set1(k.offset), old = V::load_bytes(was);
            const F before = V::fma(scale, old, offset), wanted = V::sub(before, V::mul(V::load(g), V::load(step + j)));
            const F x = V::larger(V::zero(), V::smaller(V::set1(grid.top), V::fma(wanted, V::set1(k.inverse), V::set1(k.shift))));
            const F to = V::sub(V::add(x, V::set1(WHOLE)), V::set1(WHOLE)), gone = V::sub(before, V::fma(scale, to, offset));
            const unsigned differ = V::differ(gone, V::zero()) & lanes;
            if (differ) {
                float chosen[TILE];
                V::store(less, gone), V::store(chosen, to);
                for (int64_t i = 0; i < TILE; i++) now[i] = (uint8_t)chosen[i];
            }
            return differ;
        }
        unsigned differ = 0;
        for (int64_t i = 0; i < TILE; i++) {
            if (!(lanes >> i & 1)) continue;
            const Numbers& k = own[s.group[j + i]];
            const float before = k.value(grid, was[i]);
            now[i] = step[j + i] > 0 ? (uint8_t)code_of(grid, before - g[i] * step[j + i], k.inverse, k.shift) : was[i];
            less[i] = before - k.value(grid, now[i]);
            if (less[i] != 0) differ |= 1u << i;
        }
        return differ;
    }
    // A row's changes from the c-th on to the columns from..to.
    void pass_on(int64_t r, int64_t c, int64_t from, int64_t to) {
        float* g = gradient + r * wide;
        int64_t k = from;
        for (; k + REACH <= to; k += REACH) pass_on<8>(r, c, k);
        for (; k + TILE <= to; k += TILE) pass_on<1>(r, c, k);
        for (; k < to; k++) for (int64_t i = c; i < changed[r]; i++) g[k] -= change[r][i] * s.m[column[r][i] * s.cols + k];
    }
    template <int many> void pass_on(int64_t r, int64_t c, int64_t k) {
        float* g = gradient + r * wide + k;
        F sum[many];
        for (int i = 0; i < many; i++) sum[i] = V::load(g + i * TILE);
        for (; c < changed[r]; c++) {
            const F less = V::set1(-change[r][c]);
            const float* m = s.m + column[r][c] * s.cols + k;
            for (int i = 0; i < many; i++) sum[i] = V::fma(less, V::load(m + i * TILE), sum[i]);
        }
        for (int i = 0; i < many; i++) V::store(g + i * TILE, sum[i]);
    }
    // All rows' changes.
    void pass_on(int64_t from, int64_t to) {
        for (int64_t k = from; k < to; k += REACH) for (int64_t r = 0; r < n; r++) if (changed[r]) pass_on(r, 0, k, least(k + REACH, to));
    }
};

void solve(const Solve& s, int64_t begin, int64_t end) {
    const int64_t last = least(end * TILE, s.rows);
    if (s.passes) {
        for (int64_t row = begin * TILE; row < last; row += Descent::ROWS) Descent(s, row, least(Descent::ROWS, last - row)).run();
        return;
    }
    for (int64_t row = begin * TILE; row < last; row += TILE) {
        Strip strip(s, row);
        strip.run();
        strip.keep();
    }
}

}  // namespace
}  // namespace halfbyte
