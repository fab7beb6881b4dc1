// The boundary: Python gives addresses with their sizes, and nothing is touched before every size has been checked.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>

#include <stdexcept>
#include <string>

#include "boundary.h"
#include "dispatch.h"
#include "layout.h"
#include "product.h"
#include "threads.h"

namespace nb = nanobind;
using namespace halfbyte;

namespace halfbyte {
void bind_elementwise(nb::module_& mod);
}

namespace {

Type float_type(int t) {
    if (t < 0 || t > 2) throw std::invalid_argument("float32, bfloat16 and float16 are types 0 to 2");
    return (Type)t;
}

struct Part {  // of a matrix still to be made: sizes are known, but not yet what they must be
    Values v;
    int64_t bytes = 0, inner_bytes = 0;
};

void check_part(Part& p, int64_t rows, int64_t groups, const char* what) {
    const int64_t n = product(rows, groups, what);
    Values& v = p.v;
    int64_t needed = n;
    if (v.kind == Values::floats) needed = n * size_of(v.type);
    if (v.kind == Values::nested) {
        if (v.bits == 6) needed = rows * ceil_div(groups * 6, 8);
        if (v.inner_group < 1) throw std::invalid_argument("an inner group must hold something");
        checked({(uintptr_t)v.inner, p.inner_bytes}, ceil_div(n, v.inner_group) * size_of(v.type), "the inner scale");
    }
    checked({(uintptr_t)v.data, p.bytes}, needed, what);
}

struct Handle {
    Matrix m;
    uint8_t* codes = nullptr;
    Part scale, zero;

    Handle(int64_t rows, int64_t cols, int bits, int64_t group, Span codes_, const std::vector<float>& table, std::optional<float> middle, Part scale_,
           std::optional<Part> zero_, bool zero_added, bool tiled) {
        if (bits != 4 && bits != 8) throw std::invalid_argument("the tiled layout holds codes of 4 or 8 bits");
        if (rows < 0 || cols < 1 || group < 1 || cols % group || cols * bits % 32 || group * bits % 32)
            throw std::invalid_argument("a tiled row holds whole groups of whole words");
        m.rows = rows, m.cols = cols, m.bits = bits, m.group = group, m.groups = cols / group, m.zero_added = zero_added;
        m.integers = middle.has_value(), m.middle = middle.value_or(0);
        if (bits == 8 && !m.integers) throw std::invalid_argument("codes of 8 bits must be integers");
        fill(m.table, table, (size_t)1 << bits);
        m.codes = codes = checked(codes_, product(rows, m.row_bytes(), "the matrix"), "the codes");
        scale = scale_;
        check_part(scale, rows, m.groups, "the scale");
        if (zero_) {
            zero = *zero_;
            check_part(zero, rows, m.groups, "the zero point");
        }
        for (const Part* p : {&scale, &zero})
            if (p->v.kind == Values::nested && p->v.bits == 6 && (m.groups % 8 || p->v.inner_group != 8)) throw std::invalid_argument("six-bit scales come in eights");
        m.scale = scale.v, m.zero = zero.v, m.tiled = tiled;
    }

    void tile(bool undo, int threads) {
        if (m.tiled == !undo) return;
        tile_codes(codes, m.rows, m.row_bytes(), m.bits, undo, threads);
        for (const Part* p : {&scale, &zero}) {
            uint8_t* data = const_cast<uint8_t*>(p->v.data);
            if (p->v.kind == Values::none) continue;
            if (p->v.kind == Values::nested && p->v.bits == 6) {
                tile_six_bits(data, m.rows, m.groups / 8, undo, threads);
                tile_elements(const_cast<uint8_t*>(p->v.inner), m.rows, m.groups / 8, size_of(p->v.type), undo, threads);
            } else tile_elements(data, m.rows, m.groups, p->v.kind == Values::floats ? size_of(p->v.type) : 1, undo, threads);
        }
        m.tiled = !undo;
    }

    // Canonical rows of one part, by its name: codes, scale or zero.
    void rows(const std::string& name, Span ids, Span out) const {
        if (!m.tiled) throw std::invalid_argument("the matrix is not tiled");
        const Values& v = name == "zero" ? m.zero : m.scale;
        if (name != "codes" && (v.kind == Values::none || v.kind == Values::nested)) throw std::invalid_argument("rows of a nested part");
        const int64_t n = ids.second / 8, size = v.kind == Values::floats ? size_of(v.type) : 1;
        const int64_t row = name == "codes" ? m.row_bytes() : m.groups * size;
        const int64_t* id = (const int64_t*)checked(ids, n * 8, "the index");
        uint8_t* to = checked(out, product(n, row, "the rows"), "the rows");
        for (int64_t i = 0; i < n; i++)
            if (id[i] < 0 || id[i] >= m.rows) throw std::out_of_range("row " + std::to_string(id[i]) + " of " + std::to_string(m.rows));
        nb::gil_scoped_release release;
        for (int64_t i = 0; i < n; i++, to += row) {
            if (name == "codes") untile_row(m.codes, m.rows, row, m.bits, id[i], to);
            else untile_element_row(v.data, m.rows, m.groups, size, id[i], to);
        }
    }

    // Rows [row, row + n), of which the first begins a tile.
    void dequantize(int64_t row, int64_t n, Span y, const std::string& type, int threads) {
        if (!m.tiled) throw std::invalid_argument("the matrix is not tiled");
        if (row < 0 || n < 0 || row % TILE || n > m.rows - row || (n % TILE && row + n < m.rows)) throw std::invalid_argument("rows of whole tiles are dequantized");
        const Type t = type_of(type);
        if (t == Type::e8m0) throw std::invalid_argument("no values are stored in float8_e8m0fnu");
        const Floats to{t, checked(y, product(n, m.cols * size_of(t), "y"), "y")};
        nb::gil_scoped_release release;
        halfbyte::dequantize(m, row / TILE, ceil_div(row + n, TILE), to, threads);
    }

    // As linear_int8 and linear_grad below, but all in plain numbers: a small product takes less time than a tuple.
    void multiply(uintptr_t x, int64_t x_bytes, int type, int64_t rows, uintptr_t bias, int64_t bias_bytes, int bias_type, uintptr_t y, int64_t y_bytes, int threads) {
        if (!m.tiled) throw std::invalid_argument("the matrix is not tiled");
        const Type xt = float_type(type), bt = float_type(bias_type);
        const Floats from{xt, checked({x, x_bytes}, product(rows, m.cols * size_of(xt), "x"), "x")};
        const Floats to{xt, checked({y, y_bytes}, product(rows, m.rows * size_of(xt), "y"), "y")};
        Floats b{bt, bias ? checked({bias, bias_bytes}, m.rows * size_of(bt), "the bias") : nullptr};
        nb::gil_scoped_release release;
        linear(m, from, rows, bias ? &b : nullptr, to, threads);
    }

    bool multiply_int8(Span x, Span x_scale, const std::string& scale_type, int64_t x_group, int64_t rows, std::optional<Span> bias, const std::string& bias_type, Span y,
                       const std::string& y_type, int threads) {
        if (!m.tiled) throw std::invalid_argument("the matrix is not tiled");
        if (x_group < 1 || m.cols % x_group) throw std::invalid_argument("a row of x holds whole groups");
        const Type st = type_of(scale_type), yt = type_of(y_type);
        const uint8_t* from = checked(x, product(rows, m.cols, "x"), "x");
        const Floats scales{st, checked(x_scale, product(rows, m.cols / x_group * size_of(st), "the scales of x"), "the scales of x")};
        const Floats to{yt, checked(y, product(rows, m.rows * size_of(yt), "y"), "y")};
        Floats b{Type::f32, nullptr};
        if (bias) b = {type_of(bias_type), checked(*bias, m.rows * size_of(type_of(bias_type)), "the bias")};
        nb::gil_scoped_release release;
        return linear_int8(m, from, scales, x_group, rows, bias ? &b : nullptr, to, threads);
    }

    bool grad(Span dy, const std::string& dy_type, int64_t rows, Span dx, const std::string& dx_type, int threads) {
        if (!m.tiled) throw std::invalid_argument("the matrix is not tiled");
        const Type from_type = type_of(dy_type), to_type = type_of(dx_type);
        const Floats from{from_type, checked(dy, product(rows, m.rows * size_of(from_type), "dy"), "dy")};
        const Floats to{to_type, checked(dx, product(rows, m.cols * size_of(to_type), "dx"), "dx")};
        nb::gil_scoped_release release;
        return linear_grad(m, from, rows, to, threads);
    }
};

}  // namespace

NB_MODULE(_cpu, mod) {
    nb::set_leak_warnings(false);  // caches of grids and weights live until the process ends, which it would tell users of
    mod.def("isas", [] {
        std::vector<std::string> names;
        for (const Isa* i : isas()) names.push_back(i->name);
        return names;
    });
    mod.def("isa", [] { return std::string(isa().name); });
    mod.def("use_isa", &use_isa);
    mod.def("thread_source", [] { return std::string(thread_source()); });

    bind_elementwise(mod);

    nb::class_<Part>(mod, "Values")
        .def_static("floats", [](const std::string& type, Span s) {
            Part p;
            p.v.kind = Values::floats, p.v.type = type_of(type), p.v.data = (const uint8_t*)s.first, p.bytes = s.second;
            return p;
        })
        .def_static("bytes", [](Span s) {
            Part p;
            p.v.kind = Values::bytes, p.v.data = (const uint8_t*)s.first, p.bytes = s.second;
            return p;
        })
        .def_static("nested", [](int bits, Span s, const std::vector<float>& table, const std::string& type, Span inner, int64_t inner_group, float offset) {
            if (bits != 6 && bits != 8) throw std::invalid_argument("scales are held in 6 or 8 bits");
            Part p;
            p.v.kind = Values::nested, p.v.bits = bits, p.v.data = (const uint8_t*)s.first, p.bytes = s.second;
            fill(p.v.table, table, (size_t)1 << bits);
            p.v.type = type_of(type), p.v.inner = (const uint8_t*)inner.first, p.inner_bytes = inner.second;
            p.v.inner_group = inner_group, p.v.offset = offset;
            return p;
        });

    nb::class_<Handle>(mod, "Matrix")
        .def(nb::init<int64_t, int64_t, int, int64_t, Span, const std::vector<float>&, std::optional<float>, Part, std::optional<Part>, bool, bool>(),
             nb::arg("rows"), nb::arg("cols"), nb::arg("bits"), nb::arg("group"), nb::arg("codes"), nb::arg("table"), nb::arg("middle").none(),
             nb::arg("scale"), nb::arg("zero").none(), nb::arg("zero_added"),
             nb::arg("tiled"))
        .def("tile", &Handle::tile, nb::arg("undo"), nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>())
        .def_prop_ro("tiled", [](const Handle& h) { return h.m.tiled; })
        .def("rows", &Handle::rows)
        .def("multiplies_bfloat16", [](const Handle&) { return isa().forward != nullptr; })
        .def("dequantize", &Handle::dequantize)
        .def("linear", &Handle::multiply)
        .def("linear_int8", &Handle::multiply_int8)
        .def("linear_grad", &Handle::grad);
}
