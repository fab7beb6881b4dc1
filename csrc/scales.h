// A tile's scales and zero points as float32, [group][16 rows]: once a tile, so that no kernel knows how they are stored.
#pragma once
#include "simd.h"

namespace halfbyte {
namespace {

// `part` of a tile's [group][row] bytes for group g, as 16 entries of `size` bytes: padded where the tile has fewer rows.
inline const uint8_t* sixteen(const uint8_t* part, int64_t g, int n, int64_t size, uint8_t* room) {
    const uint8_t* p = part + g * n * size;
    if (n == TILE) return p;
    memset(room, 0, (size_t)(TILE * size));
    memcpy(room, p, (size_t)(n * size));
    return room;
}

inline F as_floats(Type t, const uint8_t* p) {  // of sixteen stored ones
    if (t == Type::bf16) return V::load_bf16(p);
    if (t == Type::f16) return V::load_f16(p);
    if (t == Type::f32) return V::load((const float*)p);
    float x[TILE];
    for (int r = 0; r < TILE; r++) x[r] = load_float(t, p, r);
    return V::load(x);
}

// Rows' inner scales where they run over the flattened matrix: a tile's rows may share one, or have one each.
inline F flat_inner(const Values& v, int64_t row0, int n, int64_t groups, int64_t g) {
    const int64_t first = v.inner_of(row0 * groups + g), last = v.inner_of((row0 + n - 1) * groups + g);
    if (first == last) return V::set1(load_float(v.type, v.inner, first));
    float x[TILE] = {};
    for (int r = 0; r < n; r++) x[r] = load_float(v.type, v.inner, v.inner_of((row0 + r) * groups + g));
    return V::load(x);
}

// Of groups [g0, g1), of which the first is a multiple of 8.
inline void tile_values(const Values& v, int64_t row0, int n, int64_t groups, int64_t g0, int64_t g1, float* out) {
    uint8_t room[TILE * 4], high_room[TILE * 2];
    const F offset = V::set1(v.offset);
    if (v.kind == Values::none) {
        for (int64_t g = g0; g < g1; g++) V::store(out + (g - g0) * TILE, V::zero());
    } else if (v.kind == Values::floats) {
        const int64_t size = size_of(v.type);
        const uint8_t* part = v.data + row0 * groups * size;
        for (int64_t g = g0; g < g1; g++) V::store(out + (g - g0) * TILE, as_floats(v.type, sixteen(part, g, n, size, room)));
    } else if (v.kind == Values::bytes) {
        for (int64_t g = g0; g < g1; g++) V::store(out + (g - g0) * TILE, V::load_bytes(sixteen(v.data + row0 * groups, g, n, 1, room)));
    } else if (v.bits == 8) {
        // the inner scale changes every inner_group of the flattened codes: for whole runs of g it stays as it is
        int64_t same_until = g0;
        F inner = V::zero();
        for (int64_t g = g0; g < g1; g++) {
            if (g >= same_until) {
                inner = flat_inner(v, row0, n, groups, g);
                same_until = groups;
                for (int r = 0; r < n; r++) {
                    const int64_t at = (row0 + r) * groups;
                    same_until = least(same_until, (v.inner_of(at + g) + 1) * v.inner_group - at);
                }
            }
            const F outer = V::look_up(v.table, sixteen(v.data + row0 * groups, g, n, 1, room));
            V::store(out + (g - g0) * TILE, V::add(V::mul(outer, inner), offset));
        }
    } else {
        for (int64_t b = g0 / 8; b < ceil_div(g1, 8); b++) {
            const F inner = as_floats(v.type, sixteen(v.inner + row0 * (groups / 8) * size_of(v.type), b, n, size_of(v.type), room));
            const uint8_t *low = v.data + 6 * (row0 * groups / 8 + b * n), *high = low + 4 * n;
            uint8_t low_room[TILE * 4];
            low = sixteen(low, 0, n, 4, low_room), high = sixteen(high, 0, n, 2, high_room);
            for (int i = 0; i < 8; i++) V::store(out + (8 * b + i - g0) * TILE, V::add(V::mul(V::six_bits(low, high, i), inner), offset));
        }
    }
}
inline void tile_values(const Values& v, int64_t row0, int n, int64_t groups, float* out) { tile_values(v, row0, n, groups, 0, groups, out); }

// scale[g][16] and (unless it is null) shift[g][16], such that where table[code] - center is multiplied,
// value = scale * (table - center) + shift.
inline void tile_scales(const Matrix& m, int64_t t, float center, int64_t g0, int64_t g1, float* scale, float* shift) {
    const int64_t row0 = t * TILE;
    const int n = m.tile_rows(t);
    tile_values(m.scale, row0, n, m.groups, g0, g1, scale);
    if (!shift) return;
    tile_values(m.zero, row0, n, m.groups, g0, g1, shift);
    const F c = V::set1(center), minus = V::set1(-1);
    for (int64_t g = 0; g < g1 - g0; g++) {
        const F s = V::load(scale + g * TILE), z = V::load(shift + g * TILE);
        V::store(shift + g * TILE, m.zero_added ? V::fma(s, c, z) : V::mul(s, V::fma(z, minus, c)));
    }
}
inline void tile_scales(const Matrix& m, int64_t t, float center, float* scale, float* shift) { tile_scales(m, t, center, 0, m.groups, scale, shift); }

}  // namespace
}  // namespace halfbyte
