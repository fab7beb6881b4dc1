// Rounding to a grid and back: loops over blocks that compilers make vectors of, whatever the machine. Every number is
// what the reference in torch gives, bit for bit: true divisions, no sum or product in another order.
#pragma once
#include "blocks.h"
#include "solve.h"
#include "supers.h"
#if defined(__AVX512BF16__)
#include "rounding512.h"
#endif

namespace halfbyte {
namespace {

// What is rounded, in place: see rounding.normalize.
inline void normalize(const Elements& e, const Block& b, const Scales& s, float* x) {
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        const float d = s.divisor[g], z = s.zero[g];
        if (e.grid->zero == Grid::added) for (int64_t i = begin; i < end; i++) x[i] = x[i] - z;
        if (e.multiply) for (int64_t i = begin; i < end; i++) x[i] = x[i] * d;
        else for (int64_t i = begin; i < end; i++) x[i] = x[i] / d;
    });
}

// Integers in place, less their zero point, between the lowest and the highest; a NaN stays one.
inline void round_integers(const Elements& e, const Block& b, const Scales& s, float* __restrict x, uint8_t* __restrict inside) {
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        const float low = -(e.grid->zero == Grid::integer ? s.zero[g] : e.grid->middle), high = low + e.grid->top;
        for (int64_t i = begin; i < end; i++) {
            const float r = whole(below(high + 1, above(low - 1, x[i]))), c = below(high, above(low, r));
            inside[i] = r == c;
            x[i] = c + 0.f;  // no -0
        }
    });
}

// The code of a float of 8 bits for one that is no larger than the largest of them: as torch rounds.
template <int MANTISSA> inline int32_t float8_code(int32_t size) {
    constexpr int drop = 23 - MANTISSA, bias = MANTISSA == 3 ? 7 : 15;  // bits of the mantissa that go
    constexpr int32_t smallest = (128 - bias) << 23;      // the smallest normal number, 2^(1 - bias)
    constexpr int32_t steps = (128 - bias + drop) << 23;  // added to a smaller one, it rounds to steps of the smallest
    const int32_t tiny = (int32_t)float_to_bits(bits_to_float((uint32_t)size) + bits_to_float((uint32_t)steps)) - steps;
    const int32_t usual = (size - ((127 - bias) << 23) + (1 << (drop - 1)) - 1 + (size >> drop & 1)) >> drop;
    return size < smallest ? tiny : usual;
}

// What follows keeps the grid's numbers beside it: a compiler must think that a byte it writes may be one of them.

template <int MANTISSA>
inline void codes_of_floats(const Grid& g, const float* __restrict x, int64_t n, uint8_t* __restrict codes, uint8_t* __restrict inside) {
    const float low = g.low, high = g.high;
    for (int64_t i = 0; i < n; i++) {
        const int32_t u = (int32_t)float_to_bits(below(high, above(low, x[i]))), size = u & 0x7fffffff, code = float8_code<MANTISSA>(size);
        codes[i] = (uint8_t)((u >> 24 & 0x80) | (size > 0x7f800000 ? 0x7f : code));
        inside[i] = (x[i] >= low) & (x[i] <= high);
    }
}

inline void codes_of_table(const Grid& g, const float* __restrict x, int64_t n, uint8_t* __restrict codes, uint8_t* __restrict inside) {
    const float low = g.low, high = g.high;
    for (int64_t i = 0; i < n; i++) inside[i] = (x[i] >= low) & (x[i] <= high);
    if (g.lattice) {
        constexpr float steps = LATTICE - 1;
        const uint8_t* lattice = g.lattice;
        for (int64_t i = 0; i < n; i++) {
            const float c = x[i] > -1 ? (x[i] < 1 ? x[i] : 1.f) : -1.f;  // of a NaN, -1
            codes[i] = lattice[(int32_t)((c + 1) * 0.5f * steps + 0.5f)];
        }
    } else if (g.steps <= 4) {
        float bounds[15];
        uint8_t order[16];
        memcpy(bounds, g.bounds, sizeof bounds), memcpy(order, g.order, sizeof order);
        for (int64_t i = 0; i < n; i++) {
            int32_t rank = 0;
            for (int k = 0; k < 15; k++) rank += !(bounds[k] >= x[i]);
            codes[i] = (uint8_t)rank;
        }
        for (int64_t i = 0; i < n; i++) codes[i] = order[codes[i]];
    } else {
        for (int64_t i = 0; i < n; i++) {
            int rank = 0;
            for (int step = 1 << (g.steps - 1); step; step /= 2) rank += !(g.bounds[rank + step - 1] >= x[i]) ? step : 0;
            codes[i] = g.order[rank];
        }
    }
}

inline void codes_of(const Elements& e, const Block& b, Work& w) {  // of what is no integer
    const Grid& g = *e.grid;
    if (g.kind == Grid::table) codes_of_table(g, w.x, b.n, w.codes, w.inside);
    else if (g.mantissa == 3) codes_of_floats<3>(g, w.x, b.n, w.codes, w.inside);
    else codes_of_floats<2>(g, w.x, b.n, w.codes, w.inside);
}

// The values of one run's codes, by the formulas of formats.py. In x are the grid's values already, but for the codes of
// integers where they are given; less_zero: an integer zero point is still to be taken off.
inline void decode_run(const Elements& e, const Scales& s, int64_t g, const uint8_t* codes, float* x, int64_t begin, int64_t end, bool less_zero) {
    const Grid& grid = *e.grid;
    const float scale = s.scale[g], z = s.zero[g], middle = grid.zero == Grid::integer ? z : grid.middle;
    if (codes) for (int64_t i = begin; i < end; i++) x[i] = (float)codes[i] - middle;
    else if (less_zero) for (int64_t i = begin; i < end; i++) x[i] -= z;
    for (int64_t i = begin; i < end; i++) x[i] *= scale;
    if (grid.zero == Grid::added) for (int64_t i = begin; i < end; i++) x[i] += z;
    if (e.has_offset) for (int64_t i = begin; i < end; i++) x[i] += e.offset;
}

// A block's; without codes, x holds integers less their zero point.
inline void decode(const Elements& e, const Block& b, const Scales& s, const uint8_t* codes, float* x) {
    const Grid& grid = *e.grid;
    const bool integers = grid.kind == Grid::integers;
    if (codes && !integers) for (int64_t i = 0; i < b.n; i++) x[i] = grid.values[codes[i]];
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) { decode_run(e, s, g, integers ? codes : nullptr, x, begin, end, false); });
}

#if !defined(__AVX512BF16__)
inline bool fast_codes(const Elements&, const Block&, Work&) { return false; }
inline bool fast_fake(const Elements&, const Block&, Work&) { return false; }
inline bool fast_fake_grad(const Elements&, const Block&) { return false; }
#if defined(__AVX2__)

// Of 4 bits to 16: a group has only sixteen values. They are rounded once, and looked up by their lower and upper bytes.
inline bool fast_decode(const Elements& e, const Block& b, Work& w) {
    if (e.grid->bits != 4 || e.type == Type::f32 || !b.whole(e, 32)) return false;
    const uint8_t* codes = e.codes + b.codes(e);
    uint8_t* out = e.out + 2 * b.first;
    b.runs(e, [&](int64_t begin, int64_t end, int64_t g) {
        alignas(16) float x[16];
        alignas(16) uint16_t values[32];  // 16 are used; a compiler that sees through `store` wants room for floats
        memcpy(x, e.grid->values, sizeof x);
        decode_run(e, w.s, g, nullptr, x, 0, 16, e.grid->zero == Grid::integer);
        store(e.type, x, 16, (uint8_t*)values);
        const __m128i a = _mm_load_si128((const __m128i*)values), c = _mm_load_si128((const __m128i*)(values + 8)), byte = _mm_set1_epi16(0xff);
        const __m128i lower = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(c, byte));
        const __m128i upper = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(c, 8));
        const auto put = [&](int64_t i, __m128i code) {
            const __m128i low = _mm_shuffle_epi8(lower, code), high = _mm_shuffle_epi8(upper, code);
            _mm_storeu_si128((__m128i*)(out + 2 * i), _mm_unpacklo_epi8(low, high));
            _mm_storeu_si128((__m128i*)(out + 2 * i + 16), _mm_unpackhi_epi8(low, high));
        };
        for (int64_t i = begin; i < end; i += 32) {
            const __m128i v = _mm_loadu_si128((const __m128i*)(codes + i / 2)), even = _mm_and_si128(v, _mm_set1_epi8(15));
            const __m128i odd = _mm_and_si128(_mm_srli_epi16(v, 4), _mm_set1_epi8(15));
            put(i, _mm_unpacklo_epi8(even, odd)), put(i + 16, _mm_unpackhi_epi8(even, odd));
        }
    });
    return true;
}

#else
inline bool fast_decode(const Elements&, const Block&, Work&) { return false; }
#endif
#endif

void quantize_blocks(const Elements& e, int64_t begin, int64_t end) {
    Work w;
    const Grid& grid = *e.grid;
    for (int64_t i = begin; i < end; i++) {
        const Block b(e, i);
        w.s.load_divisor(e, b), w.s.load_zero(e, b);
        if (!fast_codes(e, b, w)) {
            load(e.type, e.x + b.first * size_of(e.type), b.n, w.x);
            normalize(e, b, w.s, w.x);
            if (grid.kind != Grid::integers) codes_of(e, b, w);
            else {
                round_integers(e, b, w.s, w.x, w.inside);
                b.runs(e, [&](int64_t from, int64_t to, int64_t g) {
                    const float middle = grid.zero == Grid::integer ? w.s.zero[g] : grid.middle;
                    for (int64_t k = from; k < to; k++) w.codes[k] = (uint8_t)(int32_t)(w.x[k] + middle);
                });
            }
        }
        pack_codes(w.codes, b.n, grid.bits, e.codes_out + b.codes(e));
    }
}

void dequantize_blocks(const Elements& e, int64_t begin, int64_t end) {
    Work w;
    for (int64_t i = begin; i < end; i++) {
        const Block b(e, i);
        w.s.load_scale(e, b), w.s.load_zero(e, b);
        if (fast_decode(e, b, w)) continue;
        unpack_codes(e.codes + b.codes(e), b.n, e.grid->bits, w.codes);
        decode(e, b, w.s, w.codes, w.x);
        store(e.type, w.x, b.n, e.out + b.first * size_of(e.type));
    }
}

void fake_blocks(const Elements& e, int64_t begin, int64_t end) {
    Work w;
    const Grid& grid = *e.grid;
    for (int64_t i = begin; i < end; i++) {
        const Block b(e, i);
        w.s.load_divisor(e, b), w.s.load_scale(e, b), w.s.load_zero(e, b);
        if (fast_fake(e, b, w)) continue;
        load(e.type, e.x + b.first * size_of(e.type), b.n, w.x);
        normalize(e, b, w.s, w.x);
        if (grid.kind == Grid::integers) round_integers(e, b, w.s, w.x, w.inside);
        else codes_of(e, b, w);
        decode(e, b, w.s, grid.kind == Grid::integers ? nullptr : w.codes, w.x);
        store(e.type, w.x, b.n, e.out + b.first * size_of(e.type));
        if (e.mask) pack_mask(w.inside, b.n, e.mask + b.first / 8);
    }
}

// What is clipped passes nothing: times 0, as the reference does, so that signs and NaN are its own.
void fake_grad_blocks(const Elements& e, int64_t begin, int64_t end) {
    Work w;
    for (int64_t i = begin; i < end; i++) {
        const Block b(e, i);
        if (fast_fake_grad(e, b)) continue;
        load(e.type, e.x + b.first * size_of(e.type), b.n, w.x);
        unpack_codes(e.mask_in + b.first / 8, b.n, 1, w.inside);
        for (int64_t k = 0; k < b.n; k++) w.x[k] *= (float)w.inside[k];
        store(e.type, w.x, b.n, e.out + b.first * size_of(e.type));
    }
}

bool invertible_scales(const Values& v, int64_t begin, int64_t end) {
    float x[PIECE];
    uint32_t bad = 0;
    for (; begin < end; begin += PIECE) {
        const int64_t n = least(PIECE, end - begin);
        load(v, begin, n, x);
        for (int64_t i = 0; i < n; i++) bad |= x[i] != 0 && (float_to_bits(1 / x[i]) & 0x7fffffffu) >= 0x7f800000u;
    }
    return !bad;
}

// ---- ranges

// Integers in the order of the floats whose bits they are, so that compilers make vectors of their minima: -0 below 0.
template <class Bits> inline Bits ordered(Bits b) { return (Bits)(b ^ ((b >> (8 * sizeof(Bits) - 1)) & (Bits)~((Bits)1 << (8 * sizeof(Bits) - 1)))); }

inline float from_ordered(Type t, int32_t k) {
    if (t == Type::f32) return bits_to_float((uint32_t)ordered<int32_t>(k));
    const uint16_t b = (uint16_t)ordered<int16_t>((int16_t)k);
    return t == Type::bf16 ? bf16_to_float(b) : f16_to_float(b);
}

// False for NaN and infinity: `infinity` is its bits.
template <class Bits> inline bool range_of(const Bits* x, int64_t n, bool magnitude, Bits infinity, int32_t& low, int32_t& high) {
    constexpr Bits all = (Bits)~((Bits)1 << (8 * sizeof(Bits) - 1));
    if (magnitude) {
        Bits most = 0;
        for (int64_t i = 0; i < n; i++) {
            const Bits k = x[i] & all;
            most = k > most ? k : most;
        }
        low = 0, high = most;
        return most < infinity;
    }
    Bits least_ = ordered(x[0]), most = least_;
    for (int64_t i = 0; i < n; i++) {
        const Bits k = ordered(x[i]);
        least_ = k < least_ ? k : least_;
        most = k > most ? k : most;
    }
    low = least_, high = most;
    return most < infinity && least_ > ordered((Bits)~(all ^ infinity));
}

#if defined(__AVX2__)

// The least of 16 numbers without a sign.
inline int least16(__m256i v) {
    return _mm_extract_epi16(_mm_minpos_epu16(_mm_min_epu16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1))), 0);
}
// range_of, for n of whole vectors of 16 bits.
inline void range16(const uint16_t* x, int64_t n, bool magnitude, uint16_t& low, uint16_t& high) {
    const __m256i size = _mm256_set1_epi16(0x7fff), ones = _mm256_set1_epi16(-1);
    __m256i top = ones, bottom = ones;  // the least of what is turned around, and of what is not
    for (int64_t i = 0; i < n; i += 16) {
        prefetch((const uint8_t*)(x + i));
        const __m256i v = _mm256_loadu_si256((const __m256i*)(x + i));
        if (magnitude) top = _mm256_min_epu16(top, _mm256_andnot_si256(v, size));
        else {  // rising with the number: a negative one's bits turned, and positive ones above them
            const __m256i key = _mm256_xor_si256(v, _mm256_or_si256(_mm256_srai_epi16(v, 15), _mm256_set1_epi16((short)0x8000)));
            bottom = _mm256_min_epu16(bottom, key), top = _mm256_min_epu16(top, _mm256_xor_si256(key, ones));
        }
    }
    const auto bits = [](int key) { return (uint16_t)(key & 0x8000 ? key ^ 0x8000 : ~key); };
    high = magnitude ? (uint16_t)(0x7fff - least16(top)) : bits(0xffff - least16(top));
    low = magnitude ? 0 : bits(least16(bottom));
}

#endif

bool range_piece(const Search& s, int64_t begin, int64_t end, float* low, float* high) {
    int32_t l = 0, h = 0;
    bool finite = true;
    const uint8_t* p = s.x + begin * size_of(s.type);
    const bool magnitude = s.how == Search::magnitude;
    if (s.type == Type::f32) finite = range_of<int32_t>((const int32_t*)p, end - begin, magnitude, 0x7f800000, l, h);
    else finite = range_of<int16_t>((const int16_t*)p, end - begin, magnitude, s.type == Type::bf16 ? 0x7f80 : 0x7c00, l, h);
    *low = from_ordered(s.type, l), *high = from_ordered(s.type, h);
    return finite;
}

// Low and high of groups -> their scales and zero points: see kernels/search.py.
void settle(const Search& s, const float* low, const float* high, int64_t begin, int64_t end) {
    const int64_t n = end - begin;
    float *scale = s.scale + begin, *zero = s.zero_out + begin;
    if (s.how == Search::magnitude) for (int64_t i = 0; i < n; i++) scale[i] = high[i] / s.side;
    else if (s.how == Search::extreme) for (int64_t i = 0; i < n; i++) scale[i] = (-low[i] > high[i] ? low[i] : high[i]) / s.side;
    else for (int64_t i = 0; i < n; i++) {
        const float l = s.widen ? below(0, low[i]) : low[i], h = s.widen ? above(0, high[i]) : high[i];
        scale[i] = (h - l) / s.side;
        const float z = below(s.side, above(0, -l / (scale[i] == 0 ? 1.f : scale[i])));
        zero[i] = s.zero == Grid::added ? l : whole(z) == 0 ? z * 0 : whole(z);  // a -0 stays one
    }
    if (!s.keep_zero) for (int64_t i = 0; i < n; i++) scale[i] = scale[i] == 0 ? 1.f : scale[i];
}

bool group_ranges(const Search& s, int64_t begin, int64_t end) {
    constexpr int64_t TOGETHER = 256;
    float low[TOGETHER], high[TOGETHER];
    bool finite = true;
    for (; begin < end; begin += TOGETHER) {
        const int64_t n = least(TOGETHER, end - begin);
#if defined(__AVX2__)
        if (s.type != Type::f32 && s.group % 16 == 0 && (begin + n) * s.group <= s.n) {
            uint16_t bits[2][TOGETHER];
            for (int64_t i = 0; i < n; i++) {
                range16((const uint16_t*)s.x + (begin + i) * s.group, s.group, s.how == Search::magnitude, bits[0][i], bits[1][i]);
            }
            const uint16_t infinity = s.type == Type::bf16 ? 0x7f80 : 0x7c00;
            uint16_t strange = 0;
            for (int64_t i = 0; i < n; i++) strange |= (bits[0][i] & 0x7fff) >= infinity || (bits[1][i] & 0x7fff) >= infinity;
            finite &= !strange;
            load(s.type, (const uint8_t*)bits[0], n, low), load(s.type, (const uint8_t*)bits[1], n, high);
            settle(s, low, high, begin, begin + n);
            continue;
        }
#endif
        for (int64_t i = 0; i < n; i++) {
            const int64_t first = (begin + i) * s.group, last = least(s.n, first + s.group);
            finite &= range_piece(s, first, last, &low[i], &high[i]);
            if (last - first < s.group) low[i] = below(0, low[i]), high[i] = above(0, high[i]);  // filled with zeros
        }
        settle(s, low, high, begin, begin + n);
    }
    return finite;
}

constexpr Elementwise elementwise = {quantize_blocks,   dequantize_blocks, fake_blocks,  fake_grad_blocks,
                                     invertible_scales, range_piece,       group_ranges, settle, fit_groups, fit_supers, solve};

}  // namespace
}  // namespace halfbyte
