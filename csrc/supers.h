// Scales of super-blocks: integers times one factor, for the scales and for the minima of some groups. The two factors
// and all integers are fitted together, for sixteen super-blocks side by side.
#pragma once
#include "fit.h"

namespace halfbyte {
namespace {

inline F half(F x) {  // as float16 has it
    uint8_t bytes[32];
    V::store(Type::f16, bytes, x);
    return V::load_f16(bytes);
}

struct Supers {
    const Fit& f;
    const Groups* p;  // the first group of each, the second ...
    F bottom, top;    // of the scales' integers; minima go from 0 to the top
    F d, dmin;        // w = d * scale * code - dmin * minimum
    F scale[16], minimum[16];

    // What the error of a group is less than the sum of w x^2, with its integers as given; and its sums.
    F gain(int j, F s, F m, Sums* out = nullptr) const {
        const Grid& g = *f.grid;
        const F a = V::mul(d, s), b = V::mul(dmin, m), inverse = over(V::set1(1), a);
        const Sums r = f.zero ? p[j].sums<true>(ToIntegers{inverse, V::mul(b, inverse), V::zero(), V::set1(g.top)}) : p[j].sums<false>(integers(g, inverse));
        if (out) *out = r;
        return gained(p[j], r, a, minus(b));
    }
    F all() const {
        F sum = V::zero();
        for (int j = 0; j < f.together; j++) sum = V::add(sum, gain(j, scale[j], minimum[j]));
        return sum;
    }
    // Integers for scales and minima of groups, as near as these factors allow.
    void settle(const F* scales, const F* minima) {
        for (int j = 0; j < f.together; j++) {
            scale[j] = between(bottom, top, rounded(over(scales[j], d)));
            minimum[j] = between(V::zero(), top, rounded(over(minima[j], dmin)));
        }
    }
    // Both factors by least squares, for codes that are fixed.
    void factors() {
        double a[16] = {}, b[16] = {}, c[16] = {}, p1[16] = {}, p2[16] = {};
        for (int j = 0; j < f.together; j++) {
            Sums r;
            gain(j, scale[j], minimum[j], &r);
            float vv[16], vx[16], v[16], s[16], m[16], w[16], wx[16];
            V::store(vv, r.vv), V::store(vx, r.vx), V::store(v, r.v), V::store(s, scale[j]), V::store(m, minimum[j]);
            V::store(w, p[j].sum_w), V::store(wx, p[j].sum_wx);
            for (int l = 0; l < 16; l++) {
                a[l] += (double)s[l] * s[l] * vv[l], b[l] += (double)s[l] * m[l] * v[l], c[l] += (double)m[l] * m[l] * w[l];
                p1[l] += (double)s[l] * vx[l], p2[l] += (double)m[l] * wx[l];
            }
        }
        float of_scales[16], of_minima[16];
        V::store(of_scales, d), V::store(of_minima, dmin);
        for (int l = 0; l < 16; l++) solved(a[l], b[l], c[l], p1[l], p2[l], of_scales[l], of_minima[l]);
        d = half(V::load(of_scales)), dmin = half(V::load(of_minima));
    }
    void solved(double a, double b, double c, double p1, double p2, float& of_scales, float& of_minima) const {
        if (a <= 0) {
            if (f.zero && c > 0) of_minima = (float)(p2 < 0 ? -p2 / c : 0);
            return;
        }
        const double det = a * c - b * b;
        if (f.zero && c > 0 && det > 1e-9 * a * c) {
            const double x = (p1 * c - p2 * b) / det, y = (p1 * b - p2 * a) / det;
            if (y >= 0) { of_scales = (float)x, of_minima = (float)y; return; }
        }
        of_scales = (float)(p1 / a);
        if (f.zero && c > 0) of_minima = 0;
    }
    // Each group's integers, one step up or down where that is better.
    void steps() {
        const F one = V::set1(1), worst = V::set1(-INFINITY);
        for (int j = 0; j < f.together; j++) {
            const F s = scale[j], m = minimum[j];
            F best = gain(j, s, m);
            for (int u = -1; u <= 1; u++) {
                for (int v = f.zero ? -1 : 0; v <= (f.zero ? 1 : 0); v++) {
                    if (u == 0 && v == 0) continue;
                    const F t = V::add(s, V::set1((float)u)), n = V::add(m, V::set1((float)v));
                    F now = gain(j, t, n);
                    now = V::where_above(t, V::sub(bottom, one), V::where_above(t, top, worst, now), worst);
                    now = V::where_above(n, minus(one), V::where_above(n, top, worst, now), worst);
                    scale[j] = V::where_above(now, best, t, scale[j]), minimum[j] = V::where_above(now, best, n, minimum[j]);
                    best = V::larger(best, now);
                }
            }
        }
    }
};

struct Kept {  // the best of all that was tried
    F saved = V::set1(-INFINITY), d = V::zero(), dmin = V::zero(), scale[16] = {}, minimum[16] = {};
    void take(const Supers& s, int64_t groups) {
        const F now = s.all(), before = saved;
        d = V::where_above(now, before, s.d, d), dmin = V::where_above(now, before, s.dmin, dmin);
        for (int64_t j = 0; j < groups; j++) {
            scale[j] = V::where_above(now, before, s.scale[j], scale[j]), minimum[j] = V::where_above(now, before, s.minimum[j], minimum[j]);
        }
        saved = V::larger(before, now);
    }
};

inline void fit_super(const Fit& f, const Groups* groups, Kept& best) {
    const Grid& g = *f.inner;
    Supers s{f, groups, V::set1(-g.middle), V::set1(g.top - g.middle), {}, {}, {}, {}};
    F scales[16], minima[16], extreme = V::zero(), most = V::zero();
    for (int j = 0; j < f.together; j++) {
        const Best found = fit(f, groups[j]);
        scales[j] = found.scale, minima[j] = minus(found.zero);
        extreme = V::where_above(size(scales[j]), size(extreme), scales[j], extreme), most = V::larger(most, minima[j]);
    }
    constexpr float ratios[] = {1.f, 0.97f, 1.03f, 0.94f, 1.06f};
    for (float ratio : ratios) {
        s.d = half(V::mul(extreme, V::set1(ratio / (g.middle > 0 ? -g.middle : g.top))));
        s.dmin = half(V::mul(most, V::set1((ratio > 1 ? ratio : 1) / g.top)));
        s.settle(scales, minima);
        best.take(s, f.together);
        for (int round = 0; round < 3; round++) {  // all of them: where a lane stops may not hang on the others
            s.factors();
            s.steps();
            best.take(s, f.together);
        }
    }
}

bool fit_supers(const Fit& f, int64_t begin, int64_t end) {
    const int64_t room = ceil_div(f.group, 16) * 16;
    float *memory = (float*)scratch(0, (size_t)((2 + 32 * f.together) * room) * sizeof(float)), *next = memory + 2 * room;
    Piece piece{memory, memory + room};
    Groups groups[16];
    for (int j = 0; j < f.together; j++) groups[j].x = next, groups[j].w = next + 16 * room, next += 32 * room;
    bool finite = true;
    for (int64_t block = begin; block < end; block += 16) {
        const int64_t count = end - block < 16 ? end - block : 16;
        for (int j = 0; j < f.together; j++) finite &= load_groups(f, block * f.together + j, f.together, count, piece, groups[j]);
        Kept best;
        fit_super(f, groups, best);
        float values[16];
        const auto each = [&](F of, auto write) {
            V::store(values, of);
            for (int64_t lane = 0; lane < count; lane++) write(block + lane, values[lane]);
        };
        each(best.d, [&](int64_t b, float x) { f.scale[b] = x; });
        if (f.zero) each(best.dmin, [&](int64_t b, float x) { f.zero[b] = -x; });
        for (int j = 0; j < f.together; j++) {
            each(best.scale[j], [&](int64_t b, float x) { f.scale_codes[b * f.together + j] = (uint8_t)(int)(x + f.inner->middle); });
            if (f.zero) each(best.minimum[j], [&](int64_t b, float x) { f.zero_codes[b * f.together + j] = (uint8_t)(int)x; });
        }
    }
    return finite;
}

}  // namespace
}  // namespace halfbyte
