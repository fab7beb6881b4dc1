// Rounding and decoding with AVX-512, sixteen elements at a time and all in registers, for the formats that matter most:
// the same numbers as rounding.h's loops, which do what is refused here. Each gives false where it refuses.
#pragma once
#include "blocks.h"

namespace halfbyte {
namespace {

template <Type T> inline F load16(const uint8_t* p, int64_t i) {
    prefetch(p + i * (T == Type::f32 ? 4 : 2));
    return T == Type::f32 ? V::load((const float*)p + i) : T == Type::bf16 ? V::load_bf16(p + 2 * i) : V::load_f16(p + 2 * i);
}

// usual: x holds no number but 0 that is too small to be normal. vcvtneps2bf16 would make it 0
template <Type T> inline __m256i to_16_bits(F x, bool usual = false) {
    if (T == Type::f16) return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    if (usual) return (__m256i)_mm512_cvtneps_pbh(x);
    const I u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const I up = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd), 16);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
}

template <Type T> inline void store16(uint8_t* p, int64_t i, F x, bool usual = false) {
    if (T == Type::f32) V::store((float*)p + i, x);
    else _mm256_storeu_si256((__m256i*)(p + 2 * i), to_16_bits<T>(x, usual));
}

template <int n> struct Type_ { static constexpr Type value = (Type)n; };
template <class Each> inline void with_type(Type t, Each f) {
    if (t == Type::bf16) return f(Type_<(int)Type::bf16>{});
    return t == Type::f32 ? f(Type_<(int)Type::f32>{}) : f(Type_<(int)Type::f16>{});
}

inline F within(F x, F least_, F most) { return _mm512_min_ps(most, _mm512_max_ps(least_, x)); }  // a NaN stays one

// Neither 0 nor so small or large that a few steps with it could leave the normal numbers.
inline bool ordinary(const float* x, int64_t n, bool or_zero = false) {
    bool ok = true;
    for (int64_t i = 0; i < n; i++) {
        const float size = __builtin_fabsf(x[i]);
        ok &= (size >= 0x1p-60f && size <= 0x1p60f) | (or_zero & (size == 0));
    }
    return ok;
}

constexpr int64_t GROUPS = PIECE / 16 + 1;  // of a block whose runs are whole vectors

// Divisors of a block's groups, worked out at once, and the numbers whose quotients are the ends of a range.
struct Divisors {
    float inverse[GROUPS], from[GROUPS], to[GROUPS];

    // The range is that of the grid, or one `margin` larger, so that it can be seen what does not belong to it. False
    // where numbers are not ordinary.
    bool load(const Elements& e, const Block& b, const Scales& s, float margin) {
        const Grid& grid = *e.grid;
        const bool whole = grid.kind == Grid::integers, moved = grid.zero == Grid::integer;
        for (int64_t i = 0; i < b.groups; i++) {
            const float d = s.divisor[i], low = (whole ? -(moved ? s.zero[i] : grid.middle) : grid.low), high = whole ? low + grid.top : grid.high;
            const float x = d * (low - margin), y = d * (high + margin);
            inverse[i] = 1 / d, from[i] = x < y ? x : y, to[i] = x < y ? y : x;
        }
        return ordinary(s.divisor, b.groups);
    }
};

// x / d, rounded as a division rounds it, which takes sixteen cycles: the product with the inverse, and a correction by
// what is left over. That this is exact was checked for every divisor and all of the numbers whose quotients lie so near
// to the middle of two floats that the correction's error could matter; divisors must be ordinary for it, and numbers
// that are too small have quotients that no grid tells from 0. Quotients are taken to the range in the same go, give or
// take a rounding. Of -0, and of what is so small that 0 is left, the sign is lost.
struct Quotient {
    F divisor, inverse, from, to;

    Quotient(const Divisors& d, const Scales& s, int64_t g)
        : divisor(V::set1(s.divisor[g])), inverse(V::set1(d.inverse[g])), from(V::set1(d.from[g])), to(V::set1(d.to[g])) {}
    F of(F x) const {
        x = within(x, from, to);
        const F q = _mm512_mul_ps(x, inverse);
        return V::fma(_mm512_fnmadd_ps(q, divisor, x), inverse, q);
    }
    F with_sign(F x) const { return _mm512_or_ps(of(x), _mm512_and_ps(_mm512_xor_ps(x, divisor), V::set1(-0.f))); }
};

// x / d as whole numbers, to nearest with ties to even, as floats of WHOLE's magnitude.
template <bool ADDED> inline F whole_quotient(const Quotient& quotient, F x, F zero) {
    return _mm512_add_ps(quotient.of(ADDED ? _mm512_sub_ps(x, zero) : x), V::set1(WHOLE));
}

// The nearest of a table's values: how many bounds lie below x. A search takes four steps; where no two bounds fall into
// one of 32 equal cells, there is only one bound to compare with.
struct Nearest {
    F step, start, last, low_bound, high_bound, middle, four, two, one;
    I first, order;

    explicit Nearest(const Grid& g) {
        middle = V::set1(g.bounds[7]), four = V::load(g.bounds + 3), two = V::load(g.bounds + 1), one = V::load(g.bounds);
        order = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)g.order));
        step = V::set1(g.cell_step), start = V::set1(g.cell_start), last = V::set1(WHOLE + 31);
        low_bound = V::load(g.cell_bound), high_bound = V::load(g.cell_bound + 16), first = _mm512_loadu_si512(g.cell_rank);
    }
    static I more(I rank, F bound, F x, int n) {
        return _mm512_mask_add_epi32(rank, _mm512_cmp_ps_mask(bound, x, _CMP_NGE_UQ), rank, _mm512_set1_epi32(n));
    }
    template <bool CELLS> I rank(F x) const {
        if (CELLS) {
            const I cell = _mm512_castps_si512(within(V::fma(x, step, start), V::set1(WHOLE), last));
            const F bound = _mm512_permutex2var_ps(low_bound, cell, high_bound);
            return more(_mm512_permutexvar_epi16(cell, first), bound, x, 1);  // the upper half of `cell` finds entry 0, a 0
        }
        I r = more(_mm512_setzero_si512(), middle, x, 8);
        r = more(r, _mm512_permutexvar_ps(r, four), x, 4);
        r = more(r, _mm512_permutexvar_ps(r, two), x, 2);
        return more(r, _mm512_permutexvar_ps(r, one), x, 1);
    }
};

inline bool searched(const Elements& e) {
    const Grid& g = *e.grid;
    return g.kind == Grid::table && g.steps == 4 && !g.lattice && g.zero == Grid::none && e.multiply;
}

// Writes the lowest byte of each of code16(i)'s lanes, for all i.
template <class Code16> inline void write_codes(uint8_t* codes, int64_t begin, int64_t end, Code16 code16) {
    alignas(64) static const uint8_t PICK[64] = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,
                                                 64, 68, 72, 76, 80, 84, 88, 92, 96, 100, 104, 108, 112, 116, 120, 124};
    const I pick = _mm512_load_si512(PICK);
    for (; begin + 32 <= end; begin += 32) {
        const I a = code16(begin), b = code16(begin + 16);
        _mm256_storeu_si256((__m256i*)(codes + begin), _mm512_castsi512_si256(_mm512_permutex2var_epi8(a, pick, b)));
    }
    if (begin < end) _mm_storeu_si128((__m128i*)(codes + begin), _mm512_cvtepi32_epi8(code16(begin)));
}

template <Type T, bool ADDED> void integer_codes(const Elements& e, const Block& b, Work& w, const Divisors& divisors) {
    const uint8_t* x = e.x + b.first * size_of(T);
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        const Quotient quotient(divisors, w.s, g);
        const F zero = V::set1(w.s.zero[g]);
        const I middle = _mm512_set1_epi32((int)(e.grid->zero == Grid::integer ? w.s.zero[g] : e.grid->middle));
        write_codes(w.codes, begin, end, [&](int64_t i) {
            return _mm512_add_epi32(_mm512_castps_si512(whole_quotient<ADDED>(quotient, load16<T>(x, i), zero)), middle);
        });
    });
}

template <Type T, bool CELLS> void table_codes(const Elements& e, const Block& b, Work& w) {
    const uint8_t* x = e.x + b.first * size_of(T);
    const Nearest nearest(*e.grid);
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        const F inverse = V::set1(w.s.divisor[g]);
        write_codes(w.codes, begin, end, [&](int64_t i) {
            return _mm512_permutexvar_epi32(nearest.rank<CELLS>(_mm512_mul_ps(load16<T>(x, i), inverse)), nearest.order);
        });
    });
}

// Floats of 8 bits by torch's rounding: to nearest, ties to even, those below the smallest normal one in its steps.
template <int MANTISSA> inline F rounded_float8(F x) {
    constexpr int drop = 23 - MANTISSA, bias = MANTISSA == 3 ? 7 : 15;
    const I u = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(u, drop), _mm512_set1_epi32(1));
    const I up = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32((1 << (drop - 1)) - 1)), odd);
    const F usual = _mm512_castsi512_ps(_mm512_and_si512(up, _mm512_set1_epi32(-(1 << drop))));
    const F size = _mm512_abs_ps(x), smallest = V::set1(bits_to_float((uint32_t)(128 - bias) << 23));
    const F steps = V::set1(bits_to_float((uint32_t)(128 - bias + drop) << 23));  // added, it rounds to steps of the smallest
    const F tiny = _mm512_sub_ps(_mm512_add_ps(size, steps), steps), sign = _mm512_and_ps(x, V::set1(-0.f));
    const F r = _mm512_mask_mov_ps(usual, _mm512_cmp_ps_mask(size, smallest, _CMP_LT_OQ), _mm512_or_ps(tiny, sign));
    return _mm512_mask_mov_ps(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x);
}

template <Type T, int MANTISSA> void float8_codes(const Elements& e, const Block& b, Work& w, const Divisors& divisors) {
    const uint8_t* x = e.x + b.first * size_of(T);
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        const Quotient quotient(divisors, w.s, g);
        const F low = V::set1(e.grid->low), high = V::set1(e.grid->high);
        for (int64_t i = begin; i < end; i += 16) {
            const F q = rounded_float8<MANTISSA>(within(quotient.with_sign(load16<T>(x, i)), low, high));
            // as a half they have the same bits and some more, but for e4m3's bias of the exponent
            const __m256i half = _mm512_cvtps_ph(_mm512_mul_ps(q, V::set1(MANTISSA == 3 ? 0x1p-8f : 1)), _MM_FROUND_TO_NEAREST_INT);
            const __m256i high = _mm256_srli_epi16(half, 8), size = MANTISSA == 3 ? _mm256_srli_epi16(half, 7) : high;
            const __m256i nan = _mm256_maskz_set1_epi16(_mm512_cmp_ps_mask(q, q, _CMP_UNORD_Q), 0x7f);
            const __m256i sign = _mm256_and_si256(high, _mm256_set1_epi16(0x80));
            const __m256i code = _mm256_or_si256(_mm256_and_si256(size, _mm256_set1_epi16(0x7f)), nan);
            _mm_storeu_si128((__m128i*)(w.codes + i), _mm256_cvtepi16_epi8(_mm256_or_si256(code, sign)));
        }
    });
}

inline bool fast_codes(const Elements& e, const Block& b, Work& w) {
    const Grid& grid = *e.grid;
    Divisors divisors;
    const bool divided = grid.kind == Grid::integers || (grid.kind == Grid::float8 && grid.zero == Grid::none);
    if (!b.whole(e, 16) || !(divided ? divisors.load(e, b, w.s, 0) : searched(e))) return false;
    with_type(e.type, [&](auto at) {
        constexpr Type T = decltype(at)::value;
        if (grid.kind == Grid::table) grid.cells ? table_codes<T, true>(e, b, w) : table_codes<T, false>(e, b, w);
        else if (grid.kind == Grid::float8) grid.mantissa == 3 ? float8_codes<T, 3>(e, b, w, divisors) : float8_codes<T, 2>(e, b, w, divisors);
        else grid.zero == Grid::added ? integer_codes<T, true>(e, b, w, divisors) : integer_codes<T, false>(e, b, w, divisors);
    });
    return true;
}

// ---- fake

struct Out {  // values and, where it is wanted, the mask of one block
    uint8_t *values, *mask;
    Out(const Elements& e, const Block& b) : values(e.out + b.first * size_of(e.type)), mask(e.mask ? e.mask + b.first / 8 : nullptr) {}
    template <Type T> void put(int64_t i, F value, __mmask16 inside) const {
        store16<T>(values, i, value, true);
        if (mask) memcpy(mask + i / 8, &inside, 2);
    }
};

template <Type T, bool ADDED> void fake_integers(const Elements& e, const Block& b, Work& w, const Divisors& divisors) {
    const Grid& grid = *e.grid;
    const uint8_t* x = e.x + b.first * size_of(T);
    const Out out(e, b);
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        const Quotient quotient(divisors, w.s, g);
        const F scale = V::set1(w.s.scale[g]), zero = V::set1(w.s.zero[g]), middle = grid.zero == Grid::integer ? zero : V::set1(grid.middle);
        const F low = _mm512_sub_ps(V::set1(WHOLE), middle), high = _mm512_add_ps(low, V::set1(grid.top));
        for (int64_t i = begin; i < end; i += 16) {
            const F r = whole_quotient<ADDED>(quotient, load16<T>(x, i), zero), c = out.mask ? within(r, low, high) : r;
            const F value = _mm512_mul_ps(_mm512_sub_ps(c, V::set1(WHOLE)), scale);
            out.put<T>(i, ADDED ? _mm512_add_ps(value, zero) : value, _mm512_cmp_ps_mask(r, c, _CMP_EQ_OQ));
        }
    });
}

template <Type T, int MANTISSA> void fake_float8(const Elements& e, const Block& b, Work& w, const Divisors& divisors) {
    const uint8_t* x = e.x + b.first * size_of(T);
    const Out out(e, b);
    const F low = V::set1(e.grid->low), high = V::set1(e.grid->high);
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        const Quotient quotient(divisors, w.s, g);
        const F scale = V::set1(w.s.scale[g]);
        for (int64_t i = begin; i < end; i += 16) {
            const F q = quotient.with_sign(load16<T>(x, i)), c = within(q, low, high);
            out.put<T>(i, _mm512_mul_ps(rounded_float8<MANTISSA>(c), scale), _mm512_cmp_ps_mask(q, c, _CMP_EQ_OQ));
        }
    });
}

template <Type T, bool CELLS> void fake_table(const Elements& e, const Block& b, Work& w) {
    const Grid& grid = *e.grid;
    const uint8_t* x = e.x + b.first * size_of(T);
    const Out out(e, b);
    const Nearest nearest(*e.grid);
    const F values = _mm512_permutexvar_ps(nearest.order, V::load(grid.values)), low = V::set1(grid.low), high = V::set1(grid.high);
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        const F inverse = V::set1(w.s.divisor[g]), mine = _mm512_mul_ps(values, V::set1(w.s.scale[g]));
        for (int64_t i = begin; i < end; i += 16) {
            const F v = _mm512_mul_ps(load16<T>(x, i), inverse);
            const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(v, low, _CMP_GE_OQ), v, high, _CMP_LE_OQ);
            out.put<T>(i, _mm512_permutexvar_ps(nearest.rank<CELLS>(v), mine), inside);
        }
    });
}

inline bool fast_fake(const Elements& e, const Block& b, Work& w) {
    const Grid& grid = *e.grid;
    Divisors divisors;
    const bool divided = grid.kind == Grid::integers || (grid.kind == Grid::float8 && grid.zero == Grid::none);
    const float margin = !e.mask ? 0.f : grid.kind == Grid::integers ? 1.f : grid.high;
    if (!b.whole(e, 16) || !(divided ? divisors.load(e, b, w.s, margin) : searched(e))) return false;
    if (!ordinary(w.s.scale, b.groups, true) || (grid.zero == Grid::added && !ordinary(w.s.zero, b.groups, true))) return false;
    with_type(e.type, [&](auto at) {
        constexpr Type T = decltype(at)::value;
        if (grid.kind == Grid::table) grid.cells ? fake_table<T, true>(e, b, w) : fake_table<T, false>(e, b, w);
        else if (grid.kind == Grid::float8) grid.mantissa == 3 ? fake_float8<T, 3>(e, b, w, divisors) : fake_float8<T, 2>(e, b, w, divisors);
        else grid.zero == Grid::added ? fake_integers<T, true>(e, b, w, divisors) : fake_integers<T, false>(e, b, w, divisors);
    });
    return true;
}

// Of 16 bits, 32 at a time: what lay outside keeps its sign only, unless 0 times it is NaN.
inline bool fast_fake_grad(const Elements& e, const Block& b) {
    if (b.n % 32 || e.type == Type::f32) return false;
    const uint8_t *x = e.x + 2 * b.first, *mask = e.mask_in + b.first / 8;
    uint8_t* out = e.out + 2 * b.first;
    const I infinity = _mm512_set1_epi16(e.type == Type::bf16 ? 0x7f80 : 0x7c00), size = _mm512_set1_epi16(0x7fff);
    for (int64_t i = 0; i < b.n; i += 32) {
        uint32_t inside;
        memcpy(&inside, mask + i / 8, 4);
        prefetch(x + 2 * i);
        const I v = _mm512_loadu_si512(x + 2 * i);
        const I zero = _mm512_andnot_si512(size, v);
        const __mmask32 strange = _mm512_cmpge_epu16_mask(_mm512_and_si512(v, size), infinity);
        _mm512_storeu_si512(out + 2 * i, _mm512_mask_mov_epi16(_mm512_mask_mov_epi16(zero, inside, v), strange & ~inside, size));
    }
    return true;
}

// ---- decoding

// Of 4 bits: a group has only sixteen values. They are rounded once, and looked up as they are stored.
template <Type T> void decode_nibbles(const Elements& e, const Block& b, Work& w) {
    const Grid& grid = *e.grid;
    const uint8_t* codes = e.codes + b.codes(e);
    uint8_t* out = e.out + b.first * size_of(T);
    const F table = V::load(grid.values);
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        F values = table;
        if (grid.zero == Grid::integer) values = _mm512_sub_ps(values, V::set1(w.s.zero[g]));
        values = _mm512_mul_ps(values, V::set1(w.s.scale[g]));
        if (grid.zero == Grid::added) values = _mm512_add_ps(values, V::set1(w.s.zero[g]));
        if (e.has_offset) values = _mm512_add_ps(values, V::set1(e.offset));
        int64_t i = begin;
        if (T == Type::f32) {  // a byte in 64 bits: its low code lowest in the lower half, its high code in the upper one
            for (; i < end; i += 16) {
                const I byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)(codes + i / 2)));
                V::store((float*)out + i, _mm512_permutexvar_ps(_mm512_or_si512(byte, _mm512_slli_epi64(byte, 28)), values));
            }
            return;
        }
        const __m256i one = to_16_bits<T>(values);
        const I twice = _mm512_broadcast_i64x4(one);  // so that the fifth bit of an index, which is the next code's, is of no matter
        for (; i + 32 <= end; i += 32) {
            const I byte = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i / 2)));
            _mm512_storeu_si512(out + 2 * i, _mm512_permutexvar_epi16(_mm512_or_si512(byte, _mm512_slli_epi32(byte, 12)), twice));
        }
        if (i < end) {
            const __m256i byte = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(codes + i / 2)));
            _mm256_storeu_si256((__m256i*)(out + 2 * i), _mm256_permutexvar_epi16(_mm256_or_si256(byte, _mm256_slli_epi32(byte, 12)), one));
        }
    });
}

// Floats of 8 bits are halfs of 16 with fewer bits, but for their NaN and the exponent's bias.
template <int MANTISSA> inline F floats16(const uint8_t* codes) {
    const __m256i c = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes));
    if (MANTISSA == 2) return _mm512_cvtph_ps(_mm256_slli_epi16(c, 8));
    const __m256i size = _mm256_and_si256(c, _mm256_set1_epi16(0x7f)), sign = _mm256_slli_epi16(_mm256_and_si256(c, _mm256_set1_epi16(0x80)), 8);
    const __m256i nan = _mm256_and_si256(_mm256_cmpeq_epi16(size, _mm256_set1_epi16(0x7f)), _mm256_set1_epi16(0x7e00));
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(_mm256_or_si256(_mm256_slli_epi16(size, 7), sign), nan)), V::set1(256));
}

template <Type T, class Values16> void decode_bytes(const Elements& e, const Block& b, Work& w, bool usual, Values16 values16) {
    const Grid& grid = *e.grid;
    const uint8_t* codes = w.codes;
    uint8_t* out = e.out + b.first * size_of(T);
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        const F scale = V::set1(w.s.scale[g]), zero = V::set1(w.s.zero[g]);
        const F middle = grid.zero == Grid::integer ? zero : V::set1(grid.middle);
        for (int64_t i = begin; i < end; i += 16) {
            F value = _mm512_mul_ps(values16(codes + i, middle), scale);
            if (grid.zero == Grid::added) value = _mm512_add_ps(value, zero);
            if (e.has_offset) value = _mm512_add_ps(value, V::set1(e.offset));
            store16<T>(out, i, value, usual);
        }
    });
}

inline bool fast_decode(const Elements& e, const Block& b, Work& w) {
    const Grid& grid = *e.grid;
    if (!b.whole(e, 16)) return false;
    const bool usual = grid.kind != Grid::table && grid.zero != Grid::added && !e.has_offset && ordinary(w.s.scale, b.groups);
    if (grid.bits != 4) unpack_codes(e.codes + b.codes(e), b.n, grid.bits, w.codes);
    with_type(e.type, [&](auto at) {
        constexpr Type T = decltype(at)::value;
        if (grid.bits == 4) return decode_nibbles<T>(e, b, w);
        const auto integer = [](const uint8_t* c, F middle) { return _mm512_sub_ps(V::load_bytes(c), middle); };
        if (grid.kind == Grid::integers) decode_bytes<T>(e, b, w, usual, integer);
        else if (grid.kind == Grid::table) decode_bytes<T>(e, b, w, usual, [&](const uint8_t* c, F) { return V::look_up(grid.values, c); });
        else if (grid.mantissa == 3) decode_bytes<T>(e, b, w, usual, [](const uint8_t* c, F) { return floats16<3>(c); });
        else decode_bytes<T>(e, b, w, usual, [](const uint8_t* c, F) { return floats16<2>(c); });
    });
    return true;
}

}  // namespace
}  // namespace halfbyte
