// Few rows of x times integers, on the matrix unit's integers: x as digits to the base of 256, each a row of its own.
//
// A row of x is unit * (d0 + 256 d1 + 65536 d2 ...) with digits of a signed byte: three hold 22 bits below the row's
// largest number, four 30, more than float32 keeps of a sum. Sums of digits times codes are exact, and cost no more than
// one row's would, since the unit takes sixteen rows at the price of one. What is gained: codes need not become floats.
#pragma once
#include "amx.h"
#include "int8.h"

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

// Sums of N tiles side by side; see SmallAmx, of which this is the integers' twin.
template <int BITS, int PLANES, int N, bool FULL>
struct SmallDigits {
    static constexpr int64_t BUFFER = 1024, ROOM = 32 * 64;
    static constexpr int64_t SUMS_AT = 8 * BUFFER, ROOM_AT = SUMS_AT + 4 * 1024, SCRATCH = ROOM_AT + 4 * ROOM;
    static constexpr bool IN_PLACE = BITS == 8 && FULL;  // words of bytes are a register's rows as they lie

    const Small& s;
    const Matrix& m;
    const int row, rows, lines;  // of x: the first, how many, and how many lines their digits make
    const int deep;              // words of 4 columns in a step
    int n[N];
    int32_t* sums;
    uint8_t* room;

    SmallDigits(const Small& s, int64_t t, int row, int rows, uint8_t* scratch)
        : s(s), m(*s.m), row(row), rows(rows), lines(rows * PLANES), deep(m.group % 64 ? 8 : 16), sums((int32_t*)(scratch + SUMS_AT)), room(scratch + ROOM_AT) {
        for (int i = 0; i < N; i++) n[i] = m.tile_rows(t + i);
    }

    template <int T> const uint8_t* decode(const uint8_t* from, uint8_t* b, int64_t ahead) const {
        if constexpr (T < N) {
            const int some = FULL ? TILE : n[T];
            for (int w = 0; w < deep * BITS / 8; w++, from += 4 * some) {
                __builtin_prefetch(from + ahead);
                if constexpr (IN_PLACE) continue;
                const I v = FULL ? V::words(from) : V::words(from, some);
                if constexpr (BITS == 4) {
                    _mm512_store_si512(b + 128 * w, _mm512_and_si512(v, low_halves()));
                    _mm512_store_si512(b + 128 * w + 64, _mm512_and_si512(_mm512_srli_epi32(v, 4), low_halves()));
                } else {
                    _mm512_store_si512(b + 64 * w, v);
                }
            }
        }
        return from;
    }
    template <int T> void multiply(const uint8_t* b) const {
        if constexpr (T < N) Register<T>::multiply_bytes(b);
    }
    const uint8_t* place_x(int64_t step) const {
        uint8_t* to = room + (step & 3) * ROOM + 15 * 64;
        const int8_t* from = s.digits + row * PLANES * m.cols + 4 * deep * step;
        if (deep == 16) for (int i = 0; i < lines; i++) _mm512_store_si512(to + 64 * i, _mm512_loadu_si512(from + i * m.cols));
        else for (int i = 0; i < lines; i++) _mm256_store_si256((__m256i*)(to + 64 * i), _mm256_loadu_si256((const __m256i*)(from + i * m.cols)));
        return to;
    }
    template <int T> void add(int64_t g, int64_t count, const float* scale, const float* shift, F* total, const uint8_t* warm) const {
        if constexpr (T < N) {
            scale += (T * m.groups + g) * TILE, shift += (T * m.groups + g) * TILE;
            for (int r = 0; r < rows; r++) {
                const int32_t* begin = s.digit_sums + (row + r) * PLANES * m.groups + g;
                const float* x_sums = s.sums ? s.sums + (row + r) * m.groups + g : nullptr;
                const int32_t* c = sums + T * 256 + r * PLANES * TILE;
                F worth[PLANES], sum = total[T * rows + r];
                for (int d = 0; d < PLANES; d++) worth[d] = V::set1(s.unit[row + r] * (float)(1 << (8 * d)));
                for (int64_t i = 0; i < count; i++, c += lines * TILE) {
                    __builtin_prefetch(warm + 64 * i);
                    F f = V::zero();
                    for (int d = 0; d < PLANES; d++) {
                        const I digits = _mm512_add_epi32(_mm512_load_si512(c + d * TILE), _mm512_set1_epi32(begin[d * m.groups + i]));
                        f = V::fma(_mm512_cvtepi32_ps(digits), worth[d], f);
                    }
                    sum = V::fma(V::load(scale + i * TILE), f, sum);
                    if (x_sums) sum = V::fma(V::load(shift + i * TILE), V::set1(x_sums[i]), sum);
                }
                total[T * rows + r] = sum;
            }
        }
    }
    template <int T> void take() const {
        if constexpr (T < N) Register<T>::store(sums + T * 256);
        Register<T>::zero();
    }
    void run(int64_t t, const float* scale, const float* shift, uint8_t* buffer) const {
        F total[N * 5];
        for (int i = 0; i < N * rows; i++) total[i] = V::zero();
        const uint8_t *p0 = m.tile(t), *p1 = m.tile(t + 1 % N), *p2 = m.tile(t + 2 % N), *p3 = m.tile(t + 3 % N);
        const int64_t steps = m.cols / (4 * deep), per_group = m.group / (4 * deep), slots = 16 / lines;
        int64_t slot = 0, in_group = 0, done = 0, waiting = 0;
        const auto add_waiting = [&] {
            add<0>(done, waiting, scale, shift, total, p0 + AHEAD), add<1>(done, waiting, scale, shift, total, p1 + AHEAD);
            add<2>(done, waiting, scale, shift, total, p2 + AHEAD), add<3>(done, waiting, scale, shift, total, p3 + AHEAD);
            done += waiting, waiting = 0;
        };
        const auto after = [&](bool last) {
            if (waiting) add_waiting();
            if (++in_group < per_group) return;
            in_group = 0;
            if (++slot < slots && !last) return;
            take<0>(), take<1>(), take<2>(), take<3>();
            waiting = slot, slot = 0;
        };
        Register<0>::zero(), Register<1>::zero(), Register<2>::zero(), Register<3>::zero();
        const uint8_t* x = place_x(0);
        uint8_t *now = buffer, *next = buffer + 4 * BUFFER;
        const uint8_t *b0 = now, *b1 = now + BUFFER, *b2 = now + 2 * BUFFER, *b3 = now + 3 * BUFFER;
        if (IN_PLACE) b0 = p0, b1 = p1, b2 = p2, b3 = p3;
        p0 = decode<0>(p0, now, 0), p1 = decode<1>(p1, now + BUFFER, 0), p2 = decode<2>(p2, now + 2 * BUFFER, 0), p3 = decode<3>(p3, now + 3 * BUFFER, 0);
        const int64_t near_end = steps - AHEAD / (8 * deep * BITS);
        for (int64_t step = 1; step < steps; step++) {
            const int64_t ahead = AHEAD + (step < near_end ? 0 : (N - 1) * TILE * m.row_bytes());
            const uint8_t* next_x = place_x(step);
            HB_TILE_LOAD(4, x - 64 * slot * lines, 64);
            const uint8_t *q0 = p0, *q1 = p1, *q2 = p2, *q3 = p3;
            multiply<0>(b0), p0 = decode<0>(p0, next, ahead);
            multiply<1>(b1), p1 = decode<1>(p1, next + BUFFER, ahead);
            multiply<2>(b2), p2 = decode<2>(p2, next + 2 * BUFFER, ahead);
            multiply<3>(b3), p3 = decode<3>(p3, next + 3 * BUFFER, ahead);
            if (IN_PLACE) b0 = q0, b1 = q1, b2 = q2, b3 = q3;
            else b0 = next, b1 = next + BUFFER, b2 = next + 2 * BUFFER, b3 = next + 3 * BUFFER;
            x = next_x;
            uint8_t* const swap = now;
            now = next, next = swap;
            after(false);
        }
        HB_TILE_LOAD(4, x - 64 * slot * lines, 64);
        multiply<0>(b0), multiply<1>(b1), multiply<2>(b2), multiply<3>(b3);
        after(true);
        add_waiting();
        for (int i = 0; i < N; i++) for (int r = 0; r < rows; r++) finish(s, t + i, row + r, total[i * rows + r]);
    }
};

#endif

}  // namespace
}  // namespace halfbyte
