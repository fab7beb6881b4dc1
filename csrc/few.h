// Few rows of x on the matrix unit, which takes sixteen at the price of one: reading the codes and laying them out for it
// is what remains. Tiles of the matrix go through it N at a time, side by side, since each sum waits long for its last.
//
// Two kinds of products share the loop. AsPairs: codes become bfloat16, x is bfloat16. AsDigits: codes stay integers, and
// a row of x is unit * (d0 + 256 d1 + 65536 d2 ...) with digits of a signed byte, each a line of its own: three hold 22
// bits below the row's largest number, four 30, more than float32 keeps of a sum. Those sums are exact.
#pragma once
#include "amx.h"
#include "int8.h"
#include "isa.h"
#include "pairs.h"
#include "scales.h"

namespace halfbyte {
namespace {

#if defined(__AMX_INT8__)

// Digits of a row of x, `planes` lines of them, in the order of int8.h; sums[planes][groups]: each group's, times minus
// the middle of the codes. Gives the unit, or -1 if x is not finite.
inline float split_row(const Matrix& m, const float* x, int planes, int8_t* out, int32_t* sums) {
    F most = V::zero(), nothing = V::zero();
    for (int64_t k = 0; k < m.cols; k += TILE) {
        const F f = load_some(x + k, m.cols - k);
        most = _mm512_max_ps(most, _mm512_abs_ps(f)), nothing = V::fma(f, V::zero(), nothing);
    }
    const float largest = _mm512_reduce_max_ps(most);
    if (_mm512_reduce_add_ps(nothing) != 0) return -1;  // 0 times NaN or infinity is not 0
    if (largest < 1e-30f) {  // too small to count: digits would be of denormal units
        memset(out, 0, (size_t)(planes * m.cols));
        memset(sums, 0, (size_t)(planes * m.groups) * sizeof(int32_t));
        return 0;
    }
    // a power of two above the largest, and a bit to spare for what rounds up
    const int exponent = (int)(float_to_bits(largest) >> 23) - 126, shift = 8 * planes - 2 - exponent;
    const F by = _mm512_set1_ps(bits_to_float((uint32_t)(127 + shift / 2) << 23)), again = _mm512_set1_ps(bits_to_float((uint32_t)(127 + shift - shift / 2) << 23));
    const __m128i order = m.bits == 4 ? _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)
                                      : _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15);
    for (int64_t k = 0; k < m.cols; k += TILE) {
        I v = _mm512_cvtps_epi32(V::mul(V::mul(load_some(x + k, m.cols - k), by), again));
        for (int d = 0; d < planes; d++) {
            const __m128i digit = _mm512_cvtepi32_epi8(v);
            const __m128i ordered = _mm_shuffle_epi8(digit, order);
            if (m.cols - k >= 16) _mm_storeu_si128((__m128i*)(out + d * m.cols + k), ordered);
            else _mm_storel_epi64((__m128i*)(out + d * m.cols + k), ordered);
            v = _mm512_srai_epi32(_mm512_sub_epi32(v, _mm512_cvtepi8_epi32(digit)), 8);
        }
    }
    for (int64_t i = 0; i < planes * m.groups; i++) {
        __m256i sum = _mm256_setzero_si256();  // groups are of whole 32 columns
        for (int64_t k = 0; k < m.group; k += 32) sum = _mm256_dpbusd_epi32(sum, _mm256_set1_epi8(1), _mm256_loadu_si256((const __m256i*)(out + i * m.group + k)));
        alignas(32) int32_t parts[8];
        _mm256_store_si256((__m256i*)parts, sum);
        int32_t total = 0;
        for (int32_t part : parts) total += part;
        sums[i] = -(1 << (m.bits - 1)) * total;
    }
    return bits_to_float((uint32_t)(127 - shift) << 23);
}

// The scales of the tiles that come next, a few with each step: done at once they would leave the memory idle.
struct Ahead {
    const Small& s;
    int64_t t = 0, tiles = 0, tile = 0, g = 0;
    float *scale = nullptr, *shift = nullptr;  // [tiles][groups][16]

    explicit Ahead(const Small& s) : s(s) {}
    void begin(int64_t first, int64_t count, float* memory, int64_t room) {
        t = first, tiles = count, tile = 0, g = 0;
        scale = memory, shift = s.sums ? memory + room : nullptr;
    }
    int64_t chunks() const { return tiles * ceil_div(s.m->groups, 8); }  // of 8 groups of a tile
    void some(int64_t n) {
        for (; n > 0 && tile < tiles; n--) {
            const int64_t at = tile * s.m->groups * TILE, stop = least(g + 8, s.m->groups);
            tile_scales(*s.m, t + tile, s.center, g, stop, scale + at, shift ? shift + at : nullptr);
            g = stop;
            if (g == s.m->groups) g = 0, tile++;
        }
    }
};

template <Pairing P>
struct AsPairs {
    static constexpr int BITS = Pairs<P>::bits, LINES = 1, COLUMNS = 32;  // lines a row of x; columns a step
    static constexpr int64_t BUFFER = 2048;                               // bytes that a step of a tile is decoded to
    static constexpr bool IN_PLACE = false;
    const Small& s;
    const Pairs<P> pairs;
    explicit AsPairs(const Small& s) : s(s), pairs(s.table) {}

    int columns() const { return COLUMNS; }
    void place(int64_t row, int lines, int64_t step, uint8_t* to) const {
        for (int r = 0; r < lines; r++) _mm512_store_si512(to + 64 * r, _mm512_loadu_si512(s.x16 + (row + r) * s.m->cols + 32 * step));
    }
    template <bool FULL> const uint8_t* decode(const uint8_t* from, int n, uint8_t* b, int64_t ahead) const {
        const int rows = FULL ? TILE : n;
        for (int w = 0; w < BITS; w++, from += 4 * rows) {
            __builtin_prefetch(from + ahead);
            pairs.each(FULL ? V::words(from) : V::words(from, rows), [&](auto at, I codes) {
                constexpr int k = decltype(at)::value;
                // the halves of 8-bit codes go to registers of their own
                uint8_t* to = P == INT8 ? b + 1024 * (k % 2) + 64 * (2 * w + k / 2) : b + 64 * (4 * w + k);
                _mm512_store_si512(to, codes);
            });
        }
        return from;
    }
    template <int T> static void multiply(const uint8_t* b) {
        Register<T>::multiply(b);
        if constexpr (P == INT8) Register<T>::multiply(b + 1024);
    }
    struct Row {  // what a row's sums of a group are worth; c: where its line stands
        const float* base;
        Row(const Small& s, int64_t row, int64_t g) : base(s.base ? s.base + row * s.m->groups + g : nullptr) {}
        F sum(const uint8_t* c, int64_t i) const {
            const F f = V::load((const float*)c);
            return base ? V::add(f, V::set1(base[i])) : f;
        }
    };
};

template <int B, int PLANES>
struct AsDigits {
    static constexpr int BITS = B, LINES = PLANES;
    static constexpr int64_t BUFFER = 1024;
    static constexpr bool IN_PLACE = BITS == 8;  // full tiles' words of bytes are a register's rows as they lie
    const Small& s;
    const int words;  // of 4 columns in a step
    explicit AsDigits(const Small& s) : s(s), words(s.m->group % 64 ? 8 : 16) {}

    int columns() const { return 4 * words; }
    void place(int64_t row, int lines, int64_t step, uint8_t* to) const {
        const int8_t* from = s.digits + row * PLANES * s.m->cols + 4 * words * step;
        for (int i = 0; i < lines; i++, from += s.m->cols) {
            if (words == 16) _mm512_store_si512(to + 64 * i, _mm512_loadu_si512(from));
            else _mm256_store_si256((__m256i*)(to + 64 * i), _mm256_loadu_si256((const __m256i*)from));
        }
    }
    template <bool FULL> const uint8_t* decode(const uint8_t* from, int n, uint8_t* b, int64_t ahead) const {
        const int rows = FULL ? TILE : n;
        for (int w = 0; w < words * BITS / 8; w++, from += 4 * rows) {
            __builtin_prefetch(from + ahead);
            if constexpr (IN_PLACE && FULL) continue;
            const I v = FULL ? V::words(from) : V::words(from, rows);
            if constexpr (BITS == 4) {
                _mm512_store_si512(b + 128 * w, _mm512_and_si512(v, low_halves()));
                _mm512_store_si512(b + 128 * w + 64, _mm512_and_si512(_mm512_srli_epi32(v, 4), low_halves()));
            } else {
                _mm512_store_si512(b + 64 * w, v);
            }
        }
        return from;
    }
    template <int T> static void multiply(const uint8_t* b) { Register<T>::multiply_bytes(b); }

    struct Row {
        F worth[PLANES];
        const int32_t* begin[PLANES];
        Row(const Small& s, int64_t row, int64_t g) {
            for (int d = 0; d < PLANES; d++) {
                worth[d] = V::set1(s.unit[row] * (float)(1 << (8 * d)));
                begin[d] = s.digit_sums + (row * PLANES + d) * s.m->groups + g;
            }
        }
        F sum(const uint8_t* c, int64_t i) const {
            F f = V::zero();
            for (int d = 0; d < PLANES; d++) {
                const I digits = _mm512_add_epi32(_mm512_load_si512(c + 64 * d), _mm512_set1_epi32(begin[d][i]));
                f = V::fma(_mm512_cvtepi32_ps(digits), worth[d], f);
            }
            return f;
        }
    };
};

// N tiles from t, rows [row, row + rows) of x. FULL: all tiles have 16 rows.
template <class Kind, int N, bool FULL>
struct Few {
    // scratch: decoded codes, twice; sums; and x between lines of zeros, in turns as well
    static constexpr int64_t ROOM = 32 * 64, SUMS_AT = 8 * Kind::BUFFER, ROOM_AT = SUMS_AT + 4 * 1024, SCRATCH = ROOM_AT + 4 * ROOM;
    static constexpr bool IN_PLACE = Kind::IN_PLACE && FULL;

    const Kind& kind;
    const Small& s;
    const Matrix& m;
    const int64_t t, row;
    const int rows, lines;
    uint8_t* const memory;
    const float *scale, *shift;
    int n[N];
    F total[N * 8];

    Few(const Kind& kind, int64_t t, int64_t row, int rows, uint8_t* memory, const Ahead& scales)
        : kind(kind), s(kind.s), m(*kind.s.m), t(t), row(row), rows(rows), lines(rows * Kind::LINES), memory(memory), scale(scales.scale), shift(scales.shift) {
        for (int i = 0; i < N; i++) n[i] = m.tile_rows(t + i);
        for (int i = 0; i < N * rows; i++) total[i] = V::zero();
    }

    const uint8_t* place(int64_t step) const {
        uint8_t* to = memory + ROOM_AT + (step & 3) * ROOM + 15 * 64;
        kind.place(row, lines, step, to);
        return to;
    }
    template <int T> const uint8_t* decode(const uint8_t* from, uint8_t* b, int64_t ahead) const {
        if constexpr (T < N) return kind.template decode<FULL>(from, n[T], b, ahead);
        return from;
    }
    template <int T> void multiply(const uint8_t* b) const {
        if constexpr (T < N) Kind::template multiply<T>(b);
    }
    template <int T> void take() const {
        if constexpr (T < N) Register<T>::store(memory + SUMS_AT + T * 1024);
        Register<T>::zero();
    }
    // Adds up `count` groups from g, whose sums stood one below the other in tile T's register.
    template <int T> void add(int64_t g, int64_t count) {
        if constexpr (T < N) {
            const float *sc = scale + (T * m.groups + g) * TILE, *sh = shift ? shift + (T * m.groups + g) * TILE : nullptr;
            for (int r = 0; r < rows; r++) {
                const typename Kind::Row of(s, row + r, g);
                const float* x_sums = sh ? s.sums + (row + r) * m.groups + g : nullptr;
                const uint8_t* c = memory + SUMS_AT + T * 1024 + r * Kind::LINES * 64;
                F sum = total[T * rows + r];
                for (int64_t i = 0; i < count; i++, c += lines * 64) {
                    sum = V::fma(V::load(sc + i * TILE), of.sum(c, i), sum);
                    if (sh) sum = V::fma(V::load(sh + i * TILE), V::set1(x_sums[i]), sum);
                }
                total[T * rows + r] = sum;
            }
        }
    }

    // What is decoded is multiplied a step later, and sums are read a step after they were stored: loading what is still
    // on its way to memory waits. Register 4 holds x in the lines of the present group and zeros in all others, so that
    // several groups are summed apart in one register before it is read.
    void run(Ahead& next) {
        const int64_t steps = m.cols / kind.columns(), per_group = m.group / kind.columns(), slots = 16 / lines;
        const int64_t scales_a_step = ceil_div(next.chunks(), steps);
        const int64_t near_end = steps - AHEAD / (2 * Kind::BITS * kind.columns());
        const uint8_t *p0 = m.tile(t), *p1 = m.tile(t + 1 % N), *p2 = m.tile(t + 2 % N), *p3 = m.tile(t + 3 % N);
        uint8_t *now = memory, *later = memory + 4 * Kind::BUFFER;
        const uint8_t *b0 = now, *b1 = now + Kind::BUFFER, *b2 = now + 2 * Kind::BUFFER, *b3 = now + 3 * Kind::BUFFER;
        if (IN_PLACE) b0 = p0, b1 = p1, b2 = p2, b3 = p3;
        int64_t slot = 0, in_group = 0, done = 0, waiting = 0;
        Register<0>::zero(), Register<1>::zero(), Register<2>::zero(), Register<3>::zero();
        const uint8_t* x = place(0);
        p0 = decode<0>(p0, now, 0), p1 = decode<1>(p1, now + Kind::BUFFER, 0);
        p2 = decode<2>(p2, now + 2 * Kind::BUFFER, 0), p3 = decode<3>(p3, now + 3 * Kind::BUFFER, 0);
        for (int64_t step = 1; step <= steps; step++) {
            const bool more = step < steps;
            // each tile's own next bytes, and near its end the first ones of the tile N further on
            const int64_t ahead = AHEAD + (step < near_end ? 0 : (N - 1) * TILE * m.row_bytes());
            const uint8_t *q0 = p0, *q1 = p1, *q2 = p2, *q3 = p3, *next_x = more ? place(step) : nullptr;
            HB_TILE_LOAD(4, x - 64 * slot * lines, 64);
            multiply<0>(b0);
            if (more) p0 = decode<0>(p0, later, ahead);
            if (waiting) add<0>(done, waiting);
            multiply<1>(b1);
            if (more) p1 = decode<1>(p1, later + Kind::BUFFER, ahead);
            if (waiting) add<1>(done, waiting);
            multiply<2>(b2);
            if (more) p2 = decode<2>(p2, later + 2 * Kind::BUFFER, ahead);
            if (waiting) add<2>(done, waiting);
            multiply<3>(b3);
            if (more) p3 = decode<3>(p3, later + 3 * Kind::BUFFER, ahead);
            if (waiting) add<3>(done, waiting);
            next.some(scales_a_step);
            done += waiting, waiting = 0;
            if (IN_PLACE) b0 = q0, b1 = q1, b2 = q2, b3 = q3;
            else b0 = later, b1 = later + Kind::BUFFER, b2 = later + 2 * Kind::BUFFER, b3 = later + 3 * Kind::BUFFER;
            uint8_t* const swap = now;
            now = later, later = swap, x = next_x;
            if (++in_group < per_group) continue;
            in_group = 0;
            if (++slot < slots && more) continue;
            take<0>(), take<1>(), take<2>(), take<3>();
            waiting = slot, slot = 0;
        }
        add<0>(done, waiting), add<1>(done, waiting), add<2>(done, waiting), add<3>(done, waiting);
        for (int i = 0; i < N; i++) for (int r = 0; r < rows; r++) finish(s, t + i, row + r, total[i * rows + r]);
    }
};

template <class Kind, int N>
void few_tiles(const Kind& kind, int64_t t, uint8_t* memory, const Ahead& scales, Ahead& next) {
    constexpr int MOST = Kind::LINES == 1 ? 8 : 16 / Kind::LINES;
    const Small& s = kind.s;
    for (int64_t row = 0; row < s.rows; row += MOST) {
        const int rows = (int)least(MOST, s.rows - row);
        if (s.m->tile_rows(t + N - 1) == TILE) Few<Kind, N, true>(kind, t, row, rows, memory, scales).run(next);
        else Few<Kind, N, false>(kind, t, row, rows, memory, scales).run(next);
    }
}

template <class Kind>
void few_amx(const Small& s, int64_t begin, int64_t end) {
    using Sizes = Few<Kind, 4, true>;
    const Kind kind(s);
    const int64_t room = 4 * s.m->groups * TILE;
    float* memory = (float*)scratch(0, (size_t)(4 * room) * sizeof(float));  // scales and shifts, of these tiles and the next
    uint8_t* buffer = scratch(1, Sizes::SCRATCH);
    memset(buffer + Sizes::ROOM_AT, 0, 4 * Sizes::ROOM);
    const MatrixUnit unit(Kind::LINES == 1 ? 16 : kind.columns() / 4);
    const auto together = [&](int64_t t) { return end - t >= 4 ? 4 : end - t >= 2 ? 2 : least(1, end - t); };
    Ahead scales(s), next(s);
    next.begin(begin, together(begin), memory, room);
    // a small weight's first tiles are much of it: their lines are asked for while the scales are read
    for (int64_t t = begin; t < begin + next.tiles; t++)
        for (int64_t i = 0; i < least(AHEAD, s.m->tile_rows(t) * s.m->row_bytes()); i += 64) __builtin_prefetch(s.m->tile(t) + i);
    for (int64_t t = begin; t < end; t += scales.tiles) {
        next.some(next.chunks());
        scales.begin(t, next.tiles, next.scale, room);
        next.begin(t + scales.tiles, together(t + scales.tiles), scales.scale == memory ? memory + 2 * room : memory, room);
        if (scales.tiles == 4) few_tiles<Kind, 4>(kind, t, buffer, scales, next);
        else if (scales.tiles == 2) few_tiles<Kind, 2>(kind, t, buffer, scales, next);
        else few_tiles<Kind, 1>(kind, t, buffer, scales, next);
    }
}

#endif

}  // namespace
}  // namespace halfbyte
