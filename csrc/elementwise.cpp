#include "elementwise.h"

#include <atomic>
#include <cmath>
#include <vector>

#include "dispatch.h"
#include "threads.h"

namespace halfbyte {
namespace {

constexpr int64_t WORTH = 1 << 15;  // elements below which waking another thread costs more than it saves

int worth(int threads, int64_t elements) { return (int)least(threads, elements / WORTH + 1); }

void split(const Elements& e, int threads, void (*body)(const Elements&, int64_t, int64_t)) {
    if (e.cols) parallel(worth(threads, e.rows * e.cols), blocks_of(e), [&](int64_t begin, int64_t end) { body(e, begin, end); });
}

bool invertible(const Elements& e, int threads) {
    const int64_t groups = ceil_div(e.rows * e.cols, e.group);
    std::atomic<bool> ok{true};
    parallel(worth(threads, groups), groups, [&](int64_t begin, int64_t end) {
        if (!isa().elementwise.invertible(e.divisor, begin, end)) ok = false;
    });
    return ok;
}

void set_multiply(Elements& e, int threads) { e.multiply = e.grid->kind == Grid::table && invertible(e, threads); }

}  // namespace

void make_cells(Grid& g) {
    if (g.steps != 4) return;
    g.cell_step = 31 / (g.high - g.low), g.cell_start = WHOLE - g.low * g.cell_step;
    int rank = 0, last = 0;
    for (float& b : g.cell_bound) b = INFINITY;
    for (; rank < 15 && g.bounds[rank] < INFINITY; rank++) {
        // its cell as the kernels find it, and the rank that x has in the cells up to it. A sum rises with x: nothing
        // in a lower cell is above a bound of this one.
        const float at = std::fma(g.bounds[rank], g.cell_step, g.cell_start) - WHOLE;
        const int cell = at < 0 ? 0 : at > 31 ? 31 : (int)at;
        if (g.cell_bound[cell] < INFINITY) return;
        for (; last < cell; last++) g.cell_rank[last + 1] = (uint16_t)rank;
        g.cell_bound[cell] = g.bounds[rank];
    }
    for (; last < 31; last++) g.cell_rank[last + 1] = (uint16_t)rank;
    g.cells = true;
}

void quantize(Elements e, int threads) {
    set_multiply(e, threads);
    split(e, threads, isa().elementwise.quantize);
}

void dequantize(const Elements& e, int threads) { split(e, threads, isa().elementwise.dequantize); }

void fake(Elements e, int threads) {
    set_multiply(e, threads);
    split(e, threads, isa().elementwise.fake);
}

void fake_grad(const Elements& e, int threads) { split(e, threads, isa().elementwise.fake_grad); }

bool fit(const Fit& f, int threads) {
    const Elementwise& use = isa().elementwise;
    const auto body = f.together ? use.fit_supers : use.fit_groups;
    std::atomic<bool> finite{true};
    parallel(worth(threads, 64 * f.n), f.n / f.group / (f.together ? f.together : 1), [&](int64_t begin, int64_t end) {
        if (!body(f, begin, end)) finite = false;
    });
    return finite;
}

void solve(const Solve& s, int threads) {
    const auto body = isa().elementwise.solve;
    parallel(worth(threads, s.rows * s.cols * s.cols / 16), ceil_div(s.rows, TILE), [&](int64_t begin, int64_t end) { body(s, begin, end); });
}

bool search(const Search& s, int threads) {
    const Elementwise& use = isa().elementwise;
    const int64_t groups = ceil_div(s.n, s.group), piece = 1 << 14;
    threads = worth(threads, s.n);
    std::atomic<bool> finite{true};
    if (groups >= 8 * threads) {
        parallel(threads, groups, [&](int64_t begin, int64_t end) {
            if (!use.ranges(s, begin, end)) finite = false;
        });
        return finite;
    }
    // few groups: the threads share each
    std::vector<float> low((size_t)groups), high((size_t)groups);
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * s.group, n = least(s.group, s.n - first), pieces = ceil_div(n, piece);
        std::vector<float> lows((size_t)pieces), highs((size_t)pieces);
        parallel(threads, pieces, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i++) {
                if (!use.range(s, first + i * piece, first + least(n, (i + 1) * piece), &lows[(size_t)i], &highs[(size_t)i])) finite = false;
            }
        });
        low[(size_t)g] = lows[0], high[(size_t)g] = highs[0];
        for (int64_t i = 1; i < pieces; i++) {
            if (lows[(size_t)i] < low[(size_t)g]) low[(size_t)g] = lows[(size_t)i];
            if (highs[(size_t)i] > high[(size_t)g]) high[(size_t)g] = highs[(size_t)i];
        }
        if (n < s.group) {  // a short group is filled with zeros
            low[(size_t)g] = low[(size_t)g] > 0 ? 0 : low[(size_t)g];
            high[(size_t)g] = high[(size_t)g] < 0 ? 0 : high[(size_t)g];
        }
    }
    use.settle(s, low.data(), high.data(), 0, groups);
    return finite;
}

}  // namespace halfbyte
