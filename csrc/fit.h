// Where scales come from: the least squared error of each group, weighted, over ranges that are tried; and of a
// super-block, over the integers that its scales and minima become. See kernels/search.py for what is minimized.
#pragma once
#include <cmath>

#include "elementwise.h"
#include "simd.h"

namespace halfbyte {
namespace {

using F = V::F;

inline float total(F f) {
    float part[16];
    V::store(part, f);
    for (int step = 8; step > 0; step /= 2) for (int i = 0; i < step; i++) part[i] += part[i + step];
    return part[0];
}

struct Piece {  // one group's numbers and what their squared errors weigh, filled up to whole vectors with weights of 0
    int64_t n = 0;
    float *x = nullptr, *w = nullptr;
    float low = 0, high = 0, sum_w = 0, sum_wx = 0;
};

// What the codes of a piece stand for, before the scale: value(x) is a vector of them. As rounding.h has it, but that a
// product with the inverse stands for the division, and ties may fall elsewhere: only the choice of a scale hangs on it.
struct ToIntegers {
    F inverse, shift, low, high;  // low <= whole(x * inverse + shift) <= high
    ToIntegers(F inverse_, F low_, F high_) : inverse(inverse_), shift(V::zero()), low(low_), high(high_) {}
    ToIntegers(float scale, float shift_, float low_, float high_) : inverse(V::set1(1 / scale)), shift(V::set1(shift_)), low(V::set1(low_)), high(V::set1(high_)) {}
    F operator()(F x) const {
        const F limited = V::smaller(V::set1(4e6f), V::larger(V::set1(-4e6f), V::fma(x, inverse, shift)));
        return V::smaller(high, V::larger(low, V::sub(V::add(limited, V::set1(WHOLE)), V::set1(WHOLE))));
    }
};
struct ToTable {
    F inverse;
    const float *bounds, *steps;
    float first;
    int n;
    F operator()(F x) const {
        const F v = V::mul(x, inverse);
        F value = V::set1(first);
        for (int i = 0; i < n; i++) value = V::add_where_above(value, v, V::set1(bounds[i]), V::set1(steps[i]));
        return value;
    }
};

struct Sums { float vv = 0, vx = 0, v = 0; };  // of w * value^2, w * value * x, w * value

template <class Value> Sums sums(const Piece& p, const Value& value) {
    F vv = V::zero(), vx = V::zero(), v = V::zero();
    for (int64_t i = 0; i < p.n; i += 16) {
        const F x = V::load(p.x + i), q = value(x), wq = V::mul(V::load(p.w + i), q);
        vv = V::fma(wq, q, vv), vx = V::fma(wq, x, vx), v = V::add(v, wq);
    }
    return {total(vv), total(vx), total(v)};
}

struct Found {
    float scale = 0, zero = 0, saved = -INFINITY;  // of the squared error of zeros
    void take(float s, float z, float gain) { if (gain > saved) scale = s, zero = z, saved = gain; }
};

// The best scale for values that are fixed, and with a zero that is added the best of both.
inline void refit(const Fit& f, const Piece& p, const Sums& s, float zero, Found& best) {
    if (s.vv <= 0) {  // every code stands for 0
        float added = p.sum_wx / p.sum_w;
        if (f.negative && added > 0) added = 0;
        if (f.grid->zero == Grid::added) best.take(0, added, added * (2 * p.sum_wx - added * p.sum_w));
        else best.take(0, zero, 0);
        return;
    }
    const float plain = s.vx / s.vv;
    if (f.grid->zero != Grid::added) { best.take(plain, zero, s.vx * plain); return; }
    const float spread = s.vv - s.v * s.v / p.sum_w;
    float slope = (s.vx - s.v * p.sum_wx / p.sum_w) / (spread > 0 ? spread : 1.f), added = (p.sum_wx - slope * s.v) / p.sum_w;
    if (f.negative && added > 0) slope = plain, added = 0;
    best.take(slope, added, slope * (2 * s.vx - slope * s.vv) + added * (2 * p.sum_wx - 2 * slope * s.v - added * p.sum_w));
}

inline void try_symmetric(const Fit& f, const Piece& p, float scale, Found& best) {
    if (scale == 0) return;
    const Grid& g = *f.grid;
    if (g.kind == Grid::integers) refit(f, p, sums(p, ToIntegers(scale, 0, -g.middle, g.top - g.middle)), 0, best);
    else refit(f, p, sums(p, ToTable{V::set1(1 / scale), g.bounds, f.steps, f.first, f.values - 1}), 0, best);
}

inline void try_range(const Fit& f, const Piece& p, float low, float high, Found& best) {
    const float top = f.grid->top, scale = (high - low) / top;
    if (!(scale > 0)) return;
    if (f.grid->zero == Grid::added) { refit(f, p, sums(p, ToIntegers(scale, -low / scale, 0, top)), 0, best); return; }
    const float z = -low / scale, zero = z < 0 ? 0 : z > top ? top : (z + WHOLE) - WHOLE;
    refit(f, p, sums(p, ToIntegers(scale, 0, -zero, top - zero)), zero, best);
}

// Rounds with the best so far, and fits anew: it cannot become worse.
inline void again(const Fit& f, const Piece& p, Found& best) {
    for (int round = 0; round < 3 && best.scale != 0; round++) {
        const float before = best.saved;
        const Found b = best;
        if (f.grid->zero == Grid::none) try_symmetric(f, p, b.scale, best);
        else if (f.grid->zero == Grid::added) refit(f, p, sums(p, ToIntegers(b.scale, -b.zero / b.scale, 0, f.grid->top)), 0, best);
        else refit(f, p, sums(p, ToIntegers(b.scale, 0, -b.zero, f.grid->top - b.zero)), b.zero, best);
        if (!(best.saved > before)) return;
    }
}

// The scale of a grid without a zero that covers a group: its extreme on the end that goes furthest.
inline float covering(const Fit& f, const Piece& p) {
    const Grid& g = *f.grid;
    const float extreme = -p.low > p.high ? p.low : p.high;
    if (g.kind == Grid::table) return std::fabs(extreme) / (g.high > -g.low ? g.high : -g.low);
    return extreme / (g.middle > 0 ? -g.middle : g.top);
}

inline Found fit(const Fit& f, const Piece& p) {
    Found best;
    const Grid& g = *f.grid;
    if (g.zero == Grid::none) {
        const float full = covering(f, p);
        for (int i = 0; i < f.ratios; i++) {
            try_symmetric(f, p, full * f.ratio[i], best);
            if (f.both_signs) try_symmetric(f, p, -full * f.ratio[i], best);
        }
    } else {
        const float low = f.widen && p.low > 0 ? 0 : p.low, high = f.widen && p.high < 0 ? 0 : p.high, width = high - low;
        for (int i = 0; i < f.ratios; i++) {
            for (int j = 0; j < f.ratios; j++) {
                const float a = f.ratio[i], b = f.ratio[j];
                if (g.zero == Grid::integer) try_range(f, p, low * a, high * b, best);
                else try_range(f, p, low + width * (1 - a) / 2, high - width * (1 - b) / 2, best);
            }
        }
        if (g.zero == Grid::added && best.saved == -INFINITY) best.take(0, f.negative && low > 0 ? 0 : low, 0);  // all alike
    }
    again(f, p, best);
    return best;
}

inline bool load_piece(const Fit& f, int64_t group, Piece& p) {
    const int64_t first = group * f.group;
    int64_t i = 0;
    for (; i + 16 <= f.group; i += 16) {
        const uint8_t* at = f.x + (first + i) * size_of(f.type);
        V::store(p.x + i, f.type == Type::f32 ? V::load((const float*)at) : f.type == Type::bf16 ? V::load_bf16(at) : V::load_f16(at));
    }
    for (; i < f.group; i++) p.x[i] = load_float(f.type, f.x, first + i);
    p.n = ceil_div(f.group, 16) * 16;
    for (i = f.group; i < p.n; i++) p.x[i] = 0;
    bool finite = true;
    p.low = p.high = p.x[0];
    for (i = 0; i < f.group; i++) {
        const float x = p.x[i];
        p.low = x < p.low ? x : p.low, p.high = x > p.high ? x : p.high;
        finite &= std::fabs(x) <= 3.4028234e38f;
    }
    const float* told = f.importance ? f.importance + first % f.cols : nullptr;
    p.sum_w = p.sum_wx = 0;
    for (i = 0; i < p.n; i++) {
        const float w = (f.weigh == Fit::size ? std::fabs(p.x[i]) : 1.f) * (told && i < f.group ? told[i] : 1.f);
        p.w[i] = i < f.group ? w : 0.f;
        p.sum_w += p.w[i], p.sum_wx += p.w[i] * p.x[i];
    }
    if (p.sum_w == 0) for (i = 0; i < f.group; i++) p.w[i] = 1, p.sum_w += 1;  // nothing is told: all alike
    return finite;
}

// ---- grids without a zero: sixteen groups side by side, a group a lane, so that nothing is summed across.

constexpr int64_t WIDEST = 4096;  // numbers of a group: sixteen of them, with what they weigh, stay in a cache

struct Lanes {
    static constexpr int64_t RUN = 32;  // numbers that are summed at a time: what is saved is small beside the sums
    int64_t n = 0;
    const float *x = nullptr, *w = nullptr;  // (n, 16)
    F scale = V::zero(), saved = V::set1(-INFINITY);  // the best so far

    void take(F vv, F vx, bool turned) {
        const F plain = V::where_above(vv, V::zero(), V::div(vx, V::where_above(vv, V::zero(), vv, V::set1(1))), V::zero()), gain = V::mul(plain, vx);
        scale = V::where_above(gain, saved, turned ? V::sub(V::zero(), plain) : plain, scale);
        saved = V::larger(saved, gain);
    }

    template <class Value> void fit(const Value& value) {
        F vv = V::zero(), vx = V::zero();
        for (int64_t first = 0; first < n; first += RUN) {
            F a = V::zero(), b = V::zero();
            for (int64_t i = first; i < n && i < first + RUN; i++) {
                const F q = value(V::load(x + 16 * i)), wq = V::mul(V::load(w + 16 * i), q);
                a = V::fma(wq, q, a), b = V::fma(wq, V::load(x + 16 * i), b);
            }
            vv = V::add(vv, a), vx = V::add(vx, b);
        }
        take(vv, vx, false);
    }

    // Integers from -middle to one less than middle, by a scale and by its negative, which turns them round: rounded once.
    void fit_both(F inverse, float middle) {
        const F low = V::set1(-middle), high = V::set1(middle), least = V::set1(1 - middle), most = V::set1(middle - 1), whole = V::set1(WHOLE);
        F vv = V::zero(), vx = V::zero(), turned_vv = V::zero(), turned_vx = V::zero();
        for (int64_t first = 0; first < n; first += RUN) {
            F a = V::zero(), b = V::zero(), c = V::zero(), d = V::zero();
            for (int64_t i = first; i < n && i < first + RUN; i++) {
                const F at = V::load(x + 16 * i), by = V::load(w + 16 * i);
                const F r = V::sub(V::add(V::smaller(high, V::larger(low, V::mul(at, inverse))), whole), whole);
                const F q = V::smaller(most, r), wq = V::mul(by, q), t = V::larger(least, r), wt = V::mul(by, t);
                a = V::fma(wq, q, a), b = V::fma(wq, at, b), c = V::fma(wt, t, c), d = V::fma(wt, at, d);
            }
            vv = V::add(vv, a), vx = V::add(vx, b), turned_vv = V::add(turned_vv, c), turned_vx = V::add(turned_vx, d);
        }
        take(vv, vx, false);
        take(turned_vv, turned_vx, true);
    }

    F inverse() const {  // of the best scale; 0 where that is 0
        const F size = V::larger(scale, V::sub(V::zero(), scale));
        return V::where_above(size, V::zero(), V::div(V::set1(1), V::where_above(size, V::zero(), scale, V::set1(1))), V::zero());
    }
};

inline ToIntegers integers(const Grid& g, F inverse) { return {inverse, V::set1(-g.middle), V::set1(g.top - g.middle)}; }

inline void fit_lanes(const Fit& f, Lanes& p, F full) {
    const Grid& g = *f.grid;
    p.scale = full;
    const F inverse = p.inverse();
    const bool table = g.kind == Grid::table, turns = f.both_signs && !table && 2 * g.middle == g.top + 1;
    const auto attempt = [&](F by) {
        if (table) p.fit(ToTable{by, g.bounds, f.steps, f.first, f.values - 1});
        else p.fit(integers(g, by));
    };
    for (int i = 0; i < f.ratios; i++) {
        const F by = V::mul(inverse, V::set1(1 / f.ratio[i]));
        if (turns) { p.fit_both(by, g.middle); continue; }
        attempt(by);
        if (f.both_signs) attempt(V::sub(V::zero(), by));
    }
    for (int round = 0; round < 3; round++) attempt(p.inverse());  // as `again`; where nothing is won nothing changes
}

bool fit_side_by_side(const Fit& f, int64_t begin, int64_t end) {
    const int64_t room = ceil_div(f.group, 16) * 16;
    float* memory = (float*)scratch(0, (size_t)(34 * room) * sizeof(float));
    Piece p;
    p.x = memory, p.w = memory + room;
    float *x = memory + 2 * room, *w = x + 16 * room, full[16], scale[16];
    bool finite = true;
    for (int64_t g = begin; g < end; g += 16) {
        const int64_t count = end - g < 16 ? end - g : 16;
        for (int64_t lane = 0; lane < 16; lane++) {
            if (lane < count) finite &= load_piece(f, g + lane, p);
            full[lane] = lane < count ? covering(f, p) : 0;
            for (int64_t i = 0; i < f.group; i++) x[16 * i + lane] = lane < count ? p.x[i] : 0, w[16 * i + lane] = lane < count ? p.w[i] : 0;
        }
        Lanes lanes;
        lanes.n = f.group, lanes.x = x, lanes.w = w;
        fit_lanes(f, lanes, V::load(full));
        V::store(scale, lanes.scale);
        for (int64_t lane = 0; lane < count; lane++) f.scale[g + lane] = scale[lane] == 0 && !f.keep_zero ? 1.f : scale[lane];
    }
    return finite;
}

bool fit_groups(const Fit& f, int64_t begin, int64_t end) {
    if (f.grid->zero == Grid::none && f.group <= WIDEST) return fit_side_by_side(f, begin, end);
    const int64_t room = ceil_div(f.group, 16) * 16;
    Piece p;
    p.x = (float*)scratch(0, (size_t)(2 * room) * sizeof(float)), p.w = p.x + room;
    bool finite = true;
    for (int64_t g = begin; g < end; g++) {
        finite &= load_piece(f, g, p);
        const Found best = fit(f, p);
        f.scale[g] = best.scale == 0 && !f.keep_zero ? 1.f : best.scale;
        if (f.zero) f.zero[g] = best.zero;
    }
    return finite;
}

// ---- super-blocks: integers times one factor, for the scales and for the minima of some groups.

inline float half(float x) {
    const uint16_t h = float_to_f16(x);
    uint8_t bytes[2];
    memcpy(bytes, &h, 2);
    return load_float(Type::f16, bytes, 0);
}

struct Super {
    const Fit& f;
    Piece* p;        // its groups
    float d, dmin;   // w = d * scale * code - dmin * minimum
    float scale[16], minimum[16];
    float bottom, top;  // of the scales' integers; minima go from 0 to the top

    // What the error of a group is less than the sum of w x^2, with its integers as given; and its sums.
    float gain(int j, float s, float m, Sums* out = nullptr) const {
        const Grid& g = *f.grid;
        const float a = d * s, b = dmin * m;
        Sums r;
        if (a != 0) r = sums(p[j], f.zero ? ToIntegers(a, b / a, 0, g.top) : ToIntegers(a, 0, -g.middle, g.top - g.middle));
        if (out) *out = r;
        return a * (2 * r.vx - a * r.vv) - b * (2 * p[j].sum_wx - 2 * a * r.v + b * p[j].sum_w);
    }
    float all() const {
        float sum = 0;
        for (int j = 0; j < f.together; j++) sum += gain(j, scale[j], minimum[j]);
        return sum;
    }
    // Both factors by least squares, for codes that are fixed.
    void factors() {
        double a = 0, b = 0, c = 0, p1 = 0, p2 = 0;
        for (int j = 0; j < f.together; j++) {
            Sums r;
            gain(j, scale[j], minimum[j], &r);
            a += (double)scale[j] * scale[j] * r.vv, b += (double)scale[j] * minimum[j] * r.v, c += (double)minimum[j] * minimum[j] * p[j].sum_w;
            p1 += (double)scale[j] * r.vx, p2 += (double)minimum[j] * p[j].sum_wx;
        }
        if (a <= 0) {
            if (f.zero && c > 0) dmin = half((float)(p2 < 0 ? -p2 / c : 0));
            return;
        }
        const double det = a * c - b * b;
        if (f.zero && c > 0 && det > 1e-9 * a * c) {
            const double x = (p1 * c - p2 * b) / det, y = (p1 * b - p2 * a) / det;
            if (y >= 0) { d = half((float)x), dmin = half((float)y); return; }
        }
        d = half((float)(p1 / a));
        if (f.zero && c > 0) dmin = 0;
    }
    // Each group's integers, one step up or down where that is better.
    void steps() {
        for (int j = 0; j < f.together; j++) {
            float best = gain(j, scale[j], minimum[j]);
            const float s = scale[j], m = minimum[j];
            for (int u = -1; u <= 1; u++) {
                for (int v = f.zero ? -1 : 0; v <= (f.zero ? 1 : 0); v++) {
                    const float t = s + (float)u, n = m + (float)v;
                    if ((u == 0 && v == 0) || t < bottom || t > top || n < 0 || n > top) continue;
                    const float now = gain(j, t, n);
                    if (now > best) best = now, scale[j] = t, minimum[j] = n;
                }
            }
        }
    }
};

inline void fit_super(const Fit& f, int64_t block, Piece* pieces) {
    const Grid& g = *f.inner;
    Super s{f, pieces, 0, 0, {}, {}, -g.middle, g.top - g.middle};
    float scales[16], minima[16], extreme = 0, most = 0;
    for (int j = 0; j < f.together; j++) {
        const Found found = fit(f, pieces[j]);
        scales[j] = found.scale, minima[j] = -found.zero;
        if (std::fabs(scales[j]) > std::fabs(extreme)) extreme = scales[j];
        if (minima[j] > most) most = minima[j];
    }
    const float side = g.middle > 0 ? -g.middle : g.top;
    float saved = -INFINITY, d = 0, dmin = 0, best[2][16] = {};
    const auto take = [&] {
        const float now = s.all();
        if (!(now > saved)) return false;
        saved = now, d = s.d, dmin = s.dmin;
        memcpy(best[0], s.scale, sizeof s.scale), memcpy(best[1], s.minimum, sizeof s.minimum);
        return true;
    };
    constexpr float ratios[] = {1.f, 0.97f, 1.03f, 0.94f, 1.06f};
    for (float ratio : ratios) {
        s.d = half(extreme / side * ratio), s.dmin = half(most / g.top * (ratio > 1 ? ratio : 1));
        for (int j = 0; j < f.together; j++) {
            const float t = s.d == 0 ? 0 : (scales[j] / s.d + WHOLE) - WHOLE, n = s.dmin == 0 ? 0 : (minima[j] / s.dmin + WHOLE) - WHOLE;
            s.scale[j] = t < s.bottom ? s.bottom : t > s.top ? s.top : t, s.minimum[j] = n < 0 ? 0 : n > g.top ? g.top : n;
        }
        take();
        for (int round = 0; round < 3; round++) {
            s.factors();
            s.steps();
            if (!take()) break;
        }
    }
    for (int j = 0; j < f.together; j++) {
        f.scale_codes[block * f.together + j] = (uint8_t)(int)(best[0][j] + g.middle);
        if (f.zero) f.zero_codes[block * f.together + j] = (uint8_t)(int)best[1][j];
    }
    f.scale[block] = d;
    if (f.zero) f.zero[block] = -dmin;
}

bool fit_supers(const Fit& f, int64_t begin, int64_t end) {
    const int64_t room = ceil_div(f.group, 16) * 16;
    float* memory = (float*)scratch(0, (size_t)(2 * room * f.together) * sizeof(float));
    Piece pieces[16];
    bool finite = true;
    for (int64_t block = begin; block < end; block++) {
        for (int j = 0; j < f.together; j++) {
            Piece& p = pieces[j];
            p.x = memory + 2 * room * j, p.w = p.x + room;
            finite &= load_piece(f, block * f.together + j, p);
        }
        fit_super(f, block, pieces);
    }
    return finite;
}

}  // namespace
}  // namespace halfbyte
