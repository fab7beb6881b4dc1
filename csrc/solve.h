// Rounding that minimizes a quadratic form of its errors, (w - q) H (w - q)^T, each row by itself: sixteen rows are the
// lanes, a column after the other is rounded, and what that changes is passed on: at once to its neighbours in a span of
// columns, to all others when the span is done, so that each of their numbers is loaded once for all of the span.
#pragma once
#include "elementwise.h"
#include "simd.h"

namespace halfbyte {
namespace {

constexpr int64_t SPAN = 64, AT_ONCE = 8;

struct Strip {  // up to sixteen rows
    const Solve& s;
    int64_t first, n;  // its first row, its rows
    int64_t changed = 0, column[SPAN];  // of the present span
    float change[SPAN * TILE];
    float *numbers, *codes;          // (cols, TILE): what is to be rounded, or the gradient; what was chosen
    float *scale, *inverse, *shift, *offset;  // (groups, TILE)

    Strip(const Solve& solve, int64_t row) : s(solve), first(row), n(least(TILE, solve.rows - row)) {
        numbers = (float*)scratch(0, (size_t)((2 * s.cols + 4 * s.groups) * TILE) * sizeof(float));
        codes = numbers + s.cols * TILE, scale = codes + s.cols * TILE;
        inverse = scale + s.groups * TILE, shift = inverse + s.groups * TILE, offset = shift + s.groups * TILE;
        for (int64_t g = 0; g < s.groups; g++) {
            for (int64_t i = 0; i < TILE; i++) {
                const int64_t at = (first + i) * s.groups + g, to = g * TILE + i;
                const float a = i < n ? s.scale[at] : 0, inv = a == 0 ? 0 : 1 / a, z = i < n && s.zero ? s.zero[at] : s.grid->middle;
                const bool added = s.grid->zero == Grid::added;
                scale[to] = a, inverse[to] = inv, shift[to] = added ? -z * inv : z, offset[to] = added ? z : -z * a;
            }
        }
    }
    float value(int64_t at, int code) const {
        return s.grid->kind == Grid::integers ? scale[at] * (float)code + offset[at] : scale[at] * s.grid->values[code];
    }
    int code(int64_t at, float w) const {
        const Grid& g = *s.grid;
        if (g.kind == Grid::integers) {
            const float x = w * inverse[at] + shift[at];
            return (int)((larger(0, smaller(g.top, x)) + WHOLE) - WHOLE);
        }
        const float x = w * inverse[at];
        int low = 0, high = (1 << g.steps) - 1;  // the number of bounds below x
        while (low < high) {
            const int mid = (low + high) / 2;
            if (g.bounds[mid] < x) low = mid + 1;
            else high = mid;
        }
        return g.order[low];
    }
    static float smaller(float a, float b) { return a < b ? a : b; }
    static float larger(float a, float b) { return a > b ? a : b; }

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
    // Each column in turn, its error made good by those that follow. m: the lower Cholesky factor of the inverse of H.
    void in_order() {
        for (int64_t j = 0; j < s.cols; j++) for (int64_t i = 0; i < TILE; i++) numbers[j * TILE + i] = i < n ? s.w[(first + i) * s.cols + j] : 0;
        for (int64_t begin = 0; begin < s.cols; begin += SPAN) {
            const int64_t end = least(begin + SPAN, s.cols);
            changed = 0;
            for (int64_t j = begin; j < end; j++) {
                const int64_t at = (int64_t)s.group[j] * TILE;
                const float own = s.m[j * s.cols + j];
                float* error = change + changed * TILE;
                for (int64_t i = 0; i < TILE; i++) {
                    const float w = numbers[j * TILE + i];
                    const int c = code(at + i, w);
                    codes[j * TILE + i] = (float)c, error[i] = (w - value(at + i, c)) / own;
                }
                column[changed++] = j;
                pass_last_on(j + 1, end);
            }
            pass_on(end, s.cols);
        }
    }
    // Each code to the best there is while the others stay, as often as one still changes. m: H.
    void descend() {
        for (int64_t j = 0; j < s.cols; j++) {
            for (int64_t i = 0; i < TILE; i++) {
                codes[j * TILE + i] = i < n ? (float)s.codes[(first + i) * s.cols + j] : 0;
                numbers[j * TILE + i] = 0;
            }
        }
        for (int64_t begin = 0; begin < s.cols; begin += SPAN) {  // numbers: (q - w) H
            changed = 0;
            for (int64_t j = begin; j < least(begin + SPAN, s.cols); j++) {
                float* less = change + changed * TILE;
                const int64_t at = (int64_t)s.group[j] * TILE;
                for (int64_t i = 0; i < TILE; i++) less[i] = i < n ? s.w[(first + i) * s.cols + j] - value(at + i, (int)codes[j * TILE + i]) : 0;
                column[changed++] = j;
            }
            pass_on(0, s.cols);
        }
        bool again = true;
        for (int pass = 0; pass < s.passes && again; pass++) {
            again = false;
            for (int64_t begin = 0; begin < s.cols; begin += SPAN) {
                const int64_t end = least(begin + SPAN, s.cols);
                changed = 0;
                for (int64_t j = begin; j < end; j++) {
                    if (!better(j)) continue;
                    column[changed++] = j;
                    pass_last_on(begin, end);
                }
                if (!changed) continue;
                again = true;
                pass_on(0, begin), pass_on(end, s.cols);
            }
        }
    }
    // Moves the codes of column j, and writes the next change. False where none moves.
    bool better(int64_t j) {
        const int64_t at = (int64_t)s.group[j] * TILE;
        const float own = s.m[j * s.cols + j];
        float* less = change + changed * TILE;
        bool any = false;
        for (int64_t i = 0; i < TILE; i++) {
            const int was = (int)codes[j * TILE + i];
            const float before = value(at + i, was);
            const int now = own > 0 ? code(at + i, before - numbers[j * TILE + i] / own) : was;
            less[i] = now == was || i >= n ? 0 : before - value(at + i, now);
            any |= less[i] != 0;
            if (less[i] != 0) codes[j * TILE + i] = (float)now;
        }
        return any;
    }
    void keep() const {
        for (int64_t i = 0; i < n; i++) for (int64_t j = 0; j < s.cols; j++) s.codes[(first + i) * s.cols + j] = (uint8_t)codes[j * TILE + i];
    }
};

void solve(const Solve& s, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
        Strip strip(s, t * TILE);
        if (s.passes) strip.descend();
        else strip.in_order();
        strip.keep();
    }
}

}  // namespace
}  // namespace halfbyte
