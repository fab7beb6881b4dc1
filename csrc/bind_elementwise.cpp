// The boundary of the element-wise kernels: formats' grids, and buffers with their sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <memory>

#include "boundary.h"
#include "elementwise.h"

namespace nb = nanobind;

namespace halfbyte {
namespace {

using Typed = std::pair<std::string, Span>;  // dtype, memory

struct GridHandle {
    Grid g;
    std::unique_ptr<uint8_t[]> lattice;  // what g.lattice points to, wherever the handle is moved
};

Grid::Zero zero_of(const std::optional<std::string>& name) {
    if (!name) return Grid::none;
    return *name == "integer" ? Grid::integer : Grid::added;
}

Grid grid_of(Grid::Kind kind, int bits, const std::vector<float>& values, const std::optional<std::string>& zero) {
    if (bits < 1 || bits > 8) throw std::invalid_argument("codes have 1 to 8 bits");
    Grid g;
    g.kind = kind, g.bits = bits, g.zero = zero_of(zero);
    if (kind != Grid::integers && g.zero == Grid::integer) throw std::invalid_argument("only integers have an integer zero point");
    if (values.size() > (size_t)1 << bits) throw std::invalid_argument("more values than codes");
    fill(g.values, values, values.size());
    return g;
}

GridHandle integers(int bits, float middle, const std::vector<float>& values, const std::optional<std::string>& zero) {
    GridHandle h{grid_of(Grid::integers, bits, values, zero), {}};
    h.g.middle = middle, h.g.top = (float)((1 << bits) - 1);
    return h;
}

GridHandle float8(int mantissa, float largest, const std::vector<float>& values, const std::optional<std::string>& zero) {
    if (mantissa != 2 && mantissa != 3) throw std::invalid_argument("floats of 8 bits have 2 or 3 bits of mantissa");
    GridHandle h{grid_of(Grid::float8, 8, values, zero), {}};
    h.g.mantissa = mantissa, h.g.low = -largest, h.g.high = largest;
    return h;
}

GridHandle table(int bits, float low, float high, const std::vector<float>& values, const std::vector<float>& bounds,
                 const std::vector<uint8_t>& order, Span lattice, const std::optional<std::string>& zero) {
    GridHandle h{grid_of(Grid::table, bits, values, zero), {}};
    Grid& g = h.g;
    if (order.empty() || order.size() > 256 || bounds.size() + 1 != order.size())
        throw std::invalid_argument("a table has a bound between each two codes of its order");
    g.low = low, g.high = high;
    g.steps = order.size() <= 16 ? 4 : 8;
    for (int i = 0; i < 256; i++) {
        const size_t k = (size_t)i;
        g.bounds[i] = k < bounds.size() ? bounds[k] : INFINITY;
        g.order[i] = order[k < order.size() ? k : order.size() - 1];
        if (g.order[i] >> bits) throw std::invalid_argument("a code of more bits than there are");
    }
    make_cells(g);
    if (lattice.second) {
        const uint8_t* p = checked(lattice, LATTICE, "the lattice");
        h.lattice = std::make_unique<uint8_t[]>(LATTICE);
        memcpy(h.lattice.get(), p, LATTICE);
        for (int64_t i = 0; i < LATTICE; i++) if (p[i] >> bits) throw std::invalid_argument("a code of more bits than there are");
        g.lattice = h.lattice.get();
    }
    return h;
}

Values part(const Typed& t, int64_t n, const char* what) {
    Values v;
    v.kind = t.first == "uint8" ? Values::bytes : Values::floats;
    if (v.kind == Values::floats) v.type = type_of(t.first);
    v.data = checked(t.second, n * size_of(v.kind == Values::bytes ? Type::e8m0 : v.type), what);
    return v;
}

Type element_type(const std::string& name) {
    const Type t = type_of(name);
    if (t == Type::e8m0) throw std::invalid_argument("no kernel rounds " + name);
    return t;
}

struct Shape {  // of a tensor, checked
    int64_t rows, cols, n, groups;
    Shape(int64_t rows, int64_t cols, int64_t group) : rows(rows), cols(cols), n(product(rows, cols, "the tensor")), groups(0) {
        if (group < 1) throw std::invalid_argument("a group must hold something");
        groups = ceil_div(n, least(group, n + 1));
    }
};

Elements elements(const GridHandle& h, const Shape& s, int64_t group, const std::string& type) {
    Elements e;
    e.grid = &h.g;
    e.rows = s.n ? s.rows : 0, e.cols = s.n ? s.cols : 0, e.group = least(group, s.n + 1), e.type = element_type(type);
    return e;
}

void set_zero(Elements& e, const std::optional<Typed>& zero, int64_t groups) {
    if (zero.has_value() != (e.grid->zero != Grid::none))
        throw std::invalid_argument("a zero point where the format has none, or none where it has one");
    if (zero) e.zero = part(*zero, groups, "the zero point");
}

int64_t code_bytes(const GridHandle& h, const Shape& s) { return product(s.rows, ceil_div(product(s.cols, h.g.bits, "a row"), 8), "the codes"); }

void bind_quantize(const GridHandle& h, int64_t rows, int64_t cols, int64_t group, const Typed& x, const Typed& scale,
                   const std::optional<Typed>& zero, Span codes, int threads) {
    const Shape s(rows, cols, group);
    Elements e = elements(h, s, group, x.first);
    e.x = checked(x.second, s.n * size_of(e.type), "the tensor");
    e.divisor = part(scale, s.groups, "the scale");
    set_zero(e, zero, s.groups);
    e.codes_out = checked(codes, code_bytes(h, s), "the codes");
    nb::gil_scoped_release release;
    quantize(e, threads);
}

void bind_dequantize(const GridHandle& h, int64_t rows, int64_t cols, int64_t group, Span codes, const Typed& scale,
                     const std::optional<Typed>& zero, std::optional<float> offset, const Typed& out, int threads) {
    const Shape s(rows, cols, group);
    Elements e = elements(h, s, group, out.first);
    e.codes = checked(codes, code_bytes(h, s), "the codes");
    e.scale = part(scale, s.groups, "the scale");
    set_zero(e, zero, s.groups);
    e.has_offset = offset.has_value(), e.offset = offset.value_or(0);
    e.out = checked(out.second, s.n * size_of(e.type), "the output");
    nb::gil_scoped_release release;
    dequantize(e, threads);
}

void bind_fake(const GridHandle& h, int64_t n, int64_t group, const Typed& x, const Typed& divisor, const Typed& scale,
               const std::optional<Typed>& zero, Span out, std::optional<Span> mask, int threads) {
    const Shape s(1, n, group);
    Elements e = elements(h, s, group, x.first);
    e.x = checked(x.second, n * size_of(e.type), "the tensor");
    e.divisor = part(divisor, s.groups, "the scale");
    e.scale = part(scale, s.groups, "the scale");
    set_zero(e, zero, s.groups);
    e.out = checked(out, n * size_of(e.type), "the output");
    if (mask) e.mask = checked(*mask, ceil_div(n, 8), "the mask");
    nb::gil_scoped_release release;
    fake(e, threads);
}

void bind_fake_grad(int64_t n, const Typed& grad, Span mask, Span out, int threads) {
    const Shape s(1, n, 1);
    const GridHandle none;
    Elements e = elements(none, s, 1, grad.first);
    e.x = checked(grad.second, n * size_of(e.type), "the gradient");
    e.mask_in = checked(mask, ceil_div(n, 8), "the mask");
    e.out = checked(out, n * size_of(e.type), "the output");
    nb::gil_scoped_release release;
    fake_grad(e, threads);
}

bool bind_search(const std::string& how, int64_t n, int64_t group, const Typed& x, float side, bool widen, bool keep_zero, Span scale,
                 const std::optional<std::string>& zero, std::optional<Span> zero_out, int threads) {
    const Shape shape(1, n, group);
    Search s;
    s.how = how == "extreme" ? Search::extreme : how == "magnitude" ? Search::magnitude : Search::range;
    if (s.how == Search::range && how != "range") throw std::invalid_argument("no such range: " + how);
    if ((s.how == Search::range) != zero_out.has_value() || zero.has_value() != zero_out.has_value())
        throw std::invalid_argument("a range has a zero point, and nothing else has");
    s.type = element_type(x.first), s.x = checked(x.second, n * size_of(s.type), "the tensor");
    s.n = n, s.group = least(group, n + 1), s.side = side, s.widen = widen, s.zero = zero_of(zero), s.keep_zero = keep_zero;
    s.scale = (float*)checked(scale, shape.groups * 4, "the scale");
    if (zero_out) s.zero_out = (float*)checked(*zero_out, shape.groups * 4, "the zero point");
    nb::gil_scoped_release release;
    return n == 0 || search(s, threads);
}

Fit::Weigh weigh_of(const std::string& name) {
    if (name == "alike") return Fit::alike;
    if (name == "size") return Fit::size;
    throw std::invalid_argument("no such weights: " + name);
}

// importance: float32 (cols,), which n is a multiple of. inner: the grid of the scales of a super-block of `together`
// groups; scale and zero are then its factors, and the codes one a group.
bool bind_fit(const GridHandle& grid, int64_t n, int64_t group, const Typed& x, const std::string& weigh, const std::vector<float>& ratios, bool both_signs,
              bool widen, bool negative, bool keep_zero, std::optional<Span> importance, int64_t cols, Span scale, std::optional<Span> zero,
              const GridHandle* inner, int64_t together, std::optional<Span> scale_codes, std::optional<Span> zero_codes, int threads) {
    if (group < 1 || n < 0 || n % group || together < 0 || together > 16 || (together && (n / group) % together))
        throw std::invalid_argument("least squares are of whole groups and super-blocks");
    if (grid.g.kind == Grid::float8 || grid.g.lattice) throw std::invalid_argument("least squares are of integers and plain tables");
    if (ratios.empty() || ratios.size() > 32) throw std::invalid_argument("1 to 32 ratios are tried");
    if ((grid.g.zero != Grid::none) != zero.has_value()) throw std::invalid_argument("a grid with a zero point needs one, others none");
    if ((together > 0) != (inner != nullptr) || (together > 0) != scale_codes.has_value() || (together > 0 && zero.has_value()) != zero_codes.has_value())
        throw std::invalid_argument("a super-block has codes for its scales and minima");
    Fit f;
    f.grid = &grid.g, f.type = element_type(x.first), f.x = checked(x.second, n * size_of(f.type), "the tensor");
    f.n = n, f.group = group, f.weigh = weigh_of(weigh), f.widen = widen, f.negative = negative, f.keep_zero = keep_zero;
    f.both_signs = both_signs, f.ratios = (int)ratios.size();
    std::copy(ratios.begin(), ratios.end(), f.ratio);
    if (grid.g.kind == Grid::table) {
        std::vector<float> sorted;
        for (int i = 0; i < 1 << grid.g.bits; i++) sorted.push_back(grid.g.values[i]);
        std::sort(sorted.begin(), sorted.end());
        sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
        f.first = sorted[0], f.values = (int)sorted.size();
        for (size_t i = 1; i < sorted.size(); i++) f.steps[i - 1] = sorted[i] - sorted[i - 1];
    }
    if (importance) {
        if (cols < 1 || n % cols || cols % group) throw std::invalid_argument("each input has an importance");
        f.importance = (const float*)checked(*importance, cols * 4, "the importance"), f.cols = cols;
    }
    const int64_t groups = n / group, factors = together ? groups / together : groups;
    f.scale = (float*)checked(scale, factors * 4, "the scale");
    if (zero) f.zero = (float*)checked(*zero, factors * 4, "the zero point");
    if (together) {
        f.together = together, f.inner = &inner->g;
        f.scale_codes = checked(*scale_codes, groups, "the codes of scales");
        if (zero_codes) f.zero_codes = checked(*zero_codes, groups, "the codes of minima");
    }
    nb::gil_scoped_release release;
    return n == 0 || fit(f, threads);
}

// float32: w (rows, cols), or with passes the gradient, which then is that of the codes found; m (cols, cols), scale and zero (rows, groups). group: int32 (cols,).
// codes: uint8 (rows, cols).
void bind_solve(const GridHandle& grid, int64_t rows, int64_t cols, int64_t groups, Span w, Span m, Span group, Span scale, std::optional<Span> zero,
                Span codes, int passes, int threads) {
    if (grid.g.kind == Grid::float8) throw std::invalid_argument("only integers and tables are solved for");
    if (rows < 0 || cols < 0 || groups < 1 || passes < 0) throw std::invalid_argument("no such shape");
    if ((grid.g.zero != Grid::none) != zero.has_value()) throw std::invalid_argument("a grid with a zero point needs one, others none");
    const int64_t n = product(rows, cols, "the tensor"), scales = product(rows, groups, "the scales");
    Solve s;
    s.grid = &grid.g, s.rows = rows, s.cols = cols, s.groups = groups, s.passes = passes;
    s.w = s.gradient = (float*)checked(w, product(n, 4, "the tensor"), "the tensor");
    s.m = (const float*)checked(m, product(product(cols, cols, "the matrix"), 4, "the matrix"), "the matrix");
    s.group = (const int32_t*)checked(group, cols * 4, "the groups of columns");
    s.scale = (const float*)checked(scale, scales * 4, "the scale");
    if (zero) s.zero = (const float*)checked(*zero, scales * 4, "the zero point");
    s.codes = checked(codes, n, "the codes");
    for (int64_t j = 0; j < cols; j++) if (s.group[j] < 0 || s.group[j] >= groups) throw std::invalid_argument("a column of a group that there is not");
    if (passes) for (int64_t i = 0; i < n; i++) if (s.codes[i] >> grid.g.bits) throw std::invalid_argument("a code of more bits than there are");
    nb::gil_scoped_release release;
    if (n) solve(s, threads);
}

}  // namespace

void bind_elementwise(nb::module_& mod) {
    nb::class_<GridHandle>(mod, "Grid")
        .def_static("integers", &integers, nb::arg("bits"), nb::arg("middle"), nb::arg("values"), nb::arg("zero").none())
        .def_static("float8", &float8, nb::arg("mantissa"), nb::arg("largest"), nb::arg("values"), nb::arg("zero").none())
        .def_static("table", &table, nb::arg("bits"), nb::arg("low"), nb::arg("high"), nb::arg("values"), nb::arg("bounds"), nb::arg("order"),
                    nb::arg("lattice"), nb::arg("zero").none());
    mod.def("quantize", &bind_quantize);
    mod.def("dequantize", &bind_dequantize);
    mod.def("fake", &bind_fake);
    mod.def("fake_grad", &bind_fake_grad);
    mod.def("search", &bind_search);
    mod.def("solve", &bind_solve, nb::arg("grid"), nb::arg("rows"), nb::arg("cols"), nb::arg("groups"), nb::arg("w"), nb::arg("m"), nb::arg("group"),
            nb::arg("scale"), nb::arg("zero").none(), nb::arg("codes"), nb::arg("passes"), nb::arg("threads"));
    mod.def("fit", &bind_fit, nb::arg("grid"), nb::arg("n"), nb::arg("group"), nb::arg("x"), nb::arg("weigh"), nb::arg("ratios"), nb::arg("both_signs"),
            nb::arg("widen"), nb::arg("negative"), nb::arg("keep_zero"), nb::arg("importance").none(), nb::arg("cols"), nb::arg("scale"), nb::arg("zero").none(),
            nb::arg("inner").none(), nb::arg("together"), nb::arg("scale_codes").none(), nb::arg("zero_codes").none(), nb::arg("threads"));
}

}  // namespace halfbyte
