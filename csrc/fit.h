// Where scales come from: the least squared error of each group, weighted, over ranges that are tried. See
// kernels/search.py for what is minimized. Sixteen groups are fitted side by side, a group a lane, so that nothing is
// summed across; of a group that is so wide that sixteen would leave the cache, all lanes are parts of one.
#pragma once
#include <cmath>

#include "elementwise.h"
#include "simd.h"

namespace halfbyte {
namespace {

using F = V::F;

inline F minus(F x) { return V::sub(V::zero(), x); }
inline F size(F x) { return V::larger(x, minus(x)); }
inline F nonzero(F x, F yes, F no) { return V::where_above(size(x), V::zero(), yes, no); }
inline F over(F x, F y) { return nonzero(y, V::div(x, nonzero(y, y, V::set1(1))), V::zero()); }  // x / y; 0 where y is 0
inline F rounded(F x) { return V::sub(V::add(x, V::set1(WHOLE)), V::set1(WHOLE)); }
inline F between(F low, F high, F x) { return V::smaller(high, V::larger(low, x)); }

inline F everywhere(F f) {  // the sum of all lanes
    float part[16];
    V::store(part, f);
    for (int step = 8; step > 0; step /= 2) for (int i = 0; i < step; i++) part[i] += part[i + step];
    return V::set1(part[0]);
}

// What codes stand for, before the scale: value(x) is a vector of them. As rounding.h has it, but that a product with the
// inverse stands for the division, and ties may fall elsewhere: only the choice of a scale hangs on it.
struct ToIntegers {
    F inverse, shift, low, high;  // low <= whole(x * inverse + shift) <= high, which are whole themselves
    F operator()(F x) const { return rounded(between(low, high, V::fma(x, inverse, shift))); }
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

struct Sums { F vv, vx, v; };  // of w * value^2, w * value * x, w * value

struct Groups {
    static constexpr int64_t RUN = 32;  // numbers that are summed at a time: what is saved is small beside the sums
    int64_t n = 0;                      // numbers of a lane
    float *x = nullptr, *w = nullptr;   // (n, 16), and what the squared errors weigh
    bool one = false;                   // whether all lanes are parts of one group
    F low, high, sum_w, sum_wx;         // of each lane's group

    template <bool with_v, class Value> Sums sums(const Value& value) const {
        Sums s{V::zero(), V::zero(), V::zero()};
        for (int64_t first = 0; first < n; first += RUN) {
            F a = V::zero(), b = V::zero(), c = V::zero();
            for (int64_t i = first; i < n && i < first + RUN; i++) {
                const F at = V::load(x + 16 * i), q = value(at), wq = V::mul(V::load(w + 16 * i), q);
                a = V::fma(wq, q, a), b = V::fma(wq, at, b);
                if (with_v) c = V::add(wq, c);
            }
            s.vv = V::add(s.vv, a), s.vx = V::add(s.vx, b), s.v = V::add(s.v, c);
        }
        return one ? Sums{everywhere(s.vv), everywhere(s.vx), everywhere(s.v)} : s;
    }

    // For integers from -middle to one less than middle, by a scale and by its negative, which turns them round: rounded
    // once. The second's sums are those of the values turned round.
    void both(F inverse, float middle, Sums& plain, Sums& turned) const {
        const F low_ = V::set1(-middle), high_ = V::set1(middle), least = V::set1(1 - middle), most = V::set1(middle - 1);
        plain = turned = {V::zero(), V::zero(), V::zero()};
        for (int64_t first = 0; first < n; first += RUN) {
            F a = V::zero(), b = V::zero(), c = V::zero(), d = V::zero();
            for (int64_t i = first; i < n && i < first + RUN; i++) {
                const F at = V::load(x + 16 * i), by = V::load(w + 16 * i), r = rounded(between(low_, high_, V::mul(at, inverse)));
                const F q = V::smaller(most, r), wq = V::mul(by, q), t = V::larger(least, r), wt = V::mul(by, t);
                a = V::fma(wq, q, a), b = V::fma(wq, at, b), c = V::fma(wt, t, c), d = V::fma(wt, at, d);
            }
            plain.vv = V::add(plain.vv, a), plain.vx = V::add(plain.vx, b);
            turned.vv = V::add(turned.vv, c), turned.vx = V::add(turned.vx, d);
        }
        if (!one) return;
        plain.vv = everywhere(plain.vv), plain.vx = everywhere(plain.vx);
        turned.vv = everywhere(turned.vv), turned.vx = everywhere(turned.vx);
    }
};

struct Best {
    F scale = V::zero(), zero = V::zero(), saved = V::set1(-INFINITY);  // of the squared error of zeros
    void take(F s, F z, F gain) {
        scale = V::where_above(gain, saved, s, scale), zero = V::where_above(gain, saved, z, zero);
        saved = V::larger(saved, gain);
    }
};

// What the squared error of a group is less than that of zeros, for scale * value + zero.
inline F gained(const Groups& p, const Sums& s, F scale, F zero) {
    const F by_scale = V::mul(scale, V::sub(V::add(s.vx, s.vx), V::mul(scale, s.vv))), mean = V::sub(p.sum_wx, V::mul(scale, s.v));
    return V::add(by_scale, V::mul(zero, V::sub(V::add(mean, mean), V::mul(zero, p.sum_w))));
}

// The best scale for values that are fixed; with a zero that is added, the best of both. Where every code stands for 0,
// so does the scale. tried: lanes where this is 0 or less are left as they are.
inline void refit(const Fit& f, const Groups& p, const Sums& s, F zero, F tried, Best& best) {
    const F plain = over(s.vx, s.vv);
    F scale = plain, gain = V::mul(plain, s.vx);
    if (f.grid->zero == Grid::added) {
        const F v_w = V::div(s.v, p.sum_w), spread = V::sub(s.vv, V::mul(s.v, v_w));
        scale = V::div(V::sub(s.vx, V::mul(v_w, p.sum_wx)), V::where_above(spread, V::zero(), spread, V::set1(1)));
        zero = V::div(V::sub(p.sum_wx, V::mul(scale, s.v)), p.sum_w);
        if (f.negative) scale = V::where_above(zero, V::zero(), plain, scale), zero = V::smaller(V::zero(), zero);
        gain = gained(p, s, scale, zero);
    }
    best.take(scale, zero, V::where_above(tried, V::zero(), gain, V::set1(-INFINITY)));
}

inline ToIntegers integers(const Grid& g, F inverse) { return {inverse, V::zero(), V::set1(-g.middle), V::set1(g.top - g.middle)}; }

inline void try_symmetric(const Fit& f, const Groups& p, F inverse, Best& best) {
    const Grid& g = *f.grid;
    const Sums s = g.kind == Grid::integers ? p.sums<false>(integers(g, inverse))
                                            : p.sums<false>(ToTable{inverse, g.bounds, f.steps, f.first, f.values - 1});
    refit(f, p, s, V::zero(), V::set1(1), best);
}

inline void try_with_zero(const Fit& f, const Groups& p, F inverse, F zero, F tried, Best& best) {
    const F top = V::set1(f.grid->top), none = V::zero();
    if (f.grid->zero == Grid::added) refit(f, p, p.sums<true>(ToIntegers{inverse, V::mul(minus(zero), inverse), none, top}), zero, tried, best);
    else refit(f, p, p.sums<false>(ToIntegers{inverse, none, minus(zero), V::sub(top, zero)}), zero, tried, best);
}

inline void try_range(const Fit& f, const Groups& p, F low, F high, Best& best) {
    const F top = V::set1(f.grid->top), scale = V::div(V::sub(high, low), top), inverse = over(V::set1(1), scale);
    const F zero = f.grid->zero == Grid::added ? low : rounded(between(V::zero(), top, V::mul(minus(low), inverse)));
    try_with_zero(f, p, inverse, zero, scale, best);
}

// Rounds with the best so far, and fits anew: it cannot become worse.
inline void again(const Fit& f, const Groups& p, Best& best) {
    for (int round = 0; round < 3; round++) {
        const F before = best.saved, inverse = over(V::set1(1), best.scale);
        if (f.grid->zero == Grid::none) try_symmetric(f, p, inverse, best);
        else try_with_zero(f, p, inverse, best.zero, size(best.scale), best);
        if (!V::differ(before, best.saved)) return;
    }
}

// The scale of a grid without a zero that covers a group: its extreme on the end that goes furthest.
inline F covering(const Grid& g, const Groups& p) {
    const F extreme = V::where_above(minus(p.low), p.high, p.low, p.high);
    if (g.kind == Grid::table) return V::div(size(extreme), V::set1(g.high > -g.low ? g.high : -g.low));
    return V::div(extreme, V::set1(g.middle > 0 ? -g.middle : g.top));
}

inline void fit_symmetric(const Fit& f, const Groups& p, Best& best) {
    const Grid& g = *f.grid;
    const F inverse = over(V::set1(1), covering(g, p));
    const bool turns = f.both_signs && g.kind == Grid::integers && 2 * g.middle == g.top + 1;
    for (int i = 0; i < f.ratios; i++) {
        const F by = V::mul(inverse, V::set1(1 / f.ratio[i]));
        if (turns) {
            Sums plain, turned;
            p.both(by, g.middle, plain, turned);
            refit(f, p, plain, V::zero(), V::set1(1), best);
            const F scale = over(turned.vx, turned.vv);
            best.take(minus(scale), V::zero(), V::mul(scale, turned.vx));
            continue;
        }
        try_symmetric(f, p, by, best);
        if (f.both_signs) try_symmetric(f, p, minus(by), best);
    }
}

inline Best fit(const Fit& f, const Groups& p) {
    Best best;
    const Grid& g = *f.grid;
    if (g.zero == Grid::none) fit_symmetric(f, p, best);
    else {
        const F low = f.widen ? V::smaller(p.low, V::zero()) : p.low, high = f.widen ? V::larger(p.high, V::zero()) : p.high, width = V::sub(high, low);
        for (int i = 0; i < f.ratios; i++) {
            for (int j = 0; j < f.ratios; j++) {
                const F a = V::set1(f.ratio[i]), b = V::set1(f.ratio[j]), half_a = V::set1((1 - f.ratio[i]) / 2), half_b = V::set1((1 - f.ratio[j]) / 2);
                if (g.zero == Grid::integer) try_range(f, p, V::mul(low, a), V::mul(high, b), best);
                else try_range(f, p, V::add(low, V::mul(width, half_a)), V::sub(high, V::mul(width, half_b)), best);
            }
        }
        if (g.zero == Grid::added) {  // all alike: nothing was tried
            const F zero = f.negative ? V::smaller(V::zero(), low) : low, none = V::set1(-INFINITY);
            best.zero = V::where_above(best.saved, none, best.zero, zero);
        }
    }
    again(f, p, best);
    return best;
}

struct Piece {  // one group's numbers and what their squared errors weigh, filled up to whole vectors with weights of 0
    float *x = nullptr, *w = nullptr;
    float low = 0, high = 0, sum_w = 0, sum_wx = 0;
};

inline bool load_piece(const Fit& f, int64_t group, Piece& p) {
    const int64_t first = group * f.group, room = ceil_div(f.group, 16) * 16;
    int64_t i = 0;
    for (; i + 16 <= f.group; i += 16) {
        const uint8_t* at = f.x + (first + i) * size_of(f.type);
        V::store(p.x + i, f.type == Type::f32 ? V::load((const float*)at) : f.type == Type::bf16 ? V::load_bf16(at) : V::load_f16(at));
    }
    for (; i < f.group; i++) p.x[i] = load_float(f.type, f.x, first + i);
    for (i = f.group; i < room; i++) p.x[i] = 0;
    bool finite = true;
    p.low = p.high = p.x[0];
    for (i = 0; i < f.group; i++) {
        const float x = p.x[i];
        p.low = x < p.low ? x : p.low, p.high = x > p.high ? x : p.high;
        finite &= std::fabs(x) <= 3.4028234e38f;
    }
    const float* told = f.importance ? f.importance + first % f.cols : nullptr;
    p.sum_w = p.sum_wx = 0;
    for (i = 0; i < room; i++) {
        const float w = (f.weigh == Fit::size ? std::fabs(p.x[i]) : 1.f) * (told && i < f.group ? told[i] : 1.f);
        p.w[i] = i < f.group ? w : 0.f;
        p.sum_w += p.w[i], p.sum_wx += p.w[i] * p.x[i];
    }
    if (p.sum_w == 0) for (i = 0; i < f.group; i++) p.w[i] = 1, p.sum_w += 1;  // nothing is told: all alike
    return finite;
}

// Sixteen groups, `step` apart, of which `count` are there; the others are zeros. piece: room for one.
inline bool load_groups(const Fit& f, int64_t first, int64_t step, int64_t count, Piece& piece, Groups& out) {
    float of[4][16];
    bool finite = true;
    out.n = f.group, out.one = false;
    for (int64_t lane = 0; lane < 16; lane++) {
        const bool there = lane < count;
        if (there) finite &= load_piece(f, first + lane * step, piece);
        of[0][lane] = there ? piece.low : 0, of[1][lane] = there ? piece.high : 0;
        of[2][lane] = there ? piece.sum_w : (float)f.group, of[3][lane] = there ? piece.sum_wx : 0;
        for (int64_t i = 0; i < f.group; i++) out.x[16 * i + lane] = there ? piece.x[i] : 0, out.w[16 * i + lane] = there ? piece.w[i] : 1;
    }
    out.low = V::load(of[0]), out.high = V::load(of[1]), out.sum_w = V::load(of[2]), out.sum_wx = V::load(of[3]);
    return finite;
}

inline bool load_one(const Fit& f, int64_t group, Groups& out) {
    Piece piece{out.x, out.w};
    const bool finite = load_piece(f, group, piece);
    out.n = ceil_div(f.group, 16), out.one = true;
    out.low = V::set1(piece.low), out.high = V::set1(piece.high), out.sum_w = V::set1(piece.sum_w), out.sum_wx = V::set1(piece.sum_wx);
    return finite;
}

constexpr int64_t WIDEST = 4096;  // numbers of a group: sixteen of them, with what they weigh, stay in a cache

bool fit_groups(const Fit& f, int64_t begin, int64_t end) {
    const bool one = f.group > WIDEST;
    const int64_t room = ceil_div(f.group, 16) * 16, lanes = one ? 1 : 16;
    float* memory = (float*)scratch(0, (size_t)(2 * (lanes + 1) * room) * sizeof(float));
    Piece piece{memory, memory + room};
    Groups p;
    p.x = memory + 2 * room, p.w = p.x + lanes * room;
    bool finite = true;
    for (int64_t g = begin; g < end; g += lanes) {
        const int64_t count = end - g < lanes ? end - g : lanes;
        finite &= one ? load_one(f, g, p) : load_groups(f, g, 1, count, piece, p);
        const Best best = fit(f, p);
        float scale[16], zero[16];
        V::store(scale, best.scale), V::store(zero, best.zero);
        for (int64_t lane = 0; lane < count; lane++) {
            f.scale[g + lane] = scale[lane] == 0 && !f.keep_zero ? 1.f : scale[lane];
            if (f.zero) f.zero[g + lane] = zero[lane];
        }
    }
    return finite;
}

}  // namespace
}  // namespace halfbyte
