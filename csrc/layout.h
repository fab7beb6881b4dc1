// The tiled layout: the bytes of 16 rows in the order in which kernels read them, in the place of the canonical ones.
#pragma once
#include "matrix.h"

namespace halfbyte {

// Canonical: a row's codes are packed along the input, first code lowest. Tiled: a tile's rows take the same bytes in
// all, but word w (4 bytes: 8 codes of 4 bits, or 4 of 8) of each of its rows stand side by side,
//
//     [w][row][4 bytes]
//
// so that a vector register holds one word of 16 rows. Inside a word the even codes lie in the low half and the odd
// ones in the high half: shifted right by the same amount, both 16-bit halves of a lane begin with the codes of two
// neighbours, which is the pair that a bf16 dot product wants. Scales and zero points stand as [group][row].
// 6-bit codes of scales: eight of them (a super-block's) take 4 bytes of low halves and 2 of high ones,
// [super-block]{[row][4 bytes], [row][2 bytes]}.
//
// A last tile of fewer rows is tiled with as many as it has. All three are their own place's permutation: they need no
// memory but one tile's, and undoing them gives the canonical bytes back.

void tile_codes(uint8_t* codes, int64_t rows, int64_t row_bytes, int bits, bool undo, int threads);
void tile_elements(uint8_t* data, int64_t rows, int64_t per_row, int64_t size, bool undo, int threads);
void tile_six_bits(uint8_t* data, int64_t rows, int64_t blocks_per_row, bool undo, int threads);

// One row, back in the canonical order.
void untile_row(const uint8_t* codes, int64_t rows, int64_t row_bytes, int bits, int64_t row, uint8_t* out);
void untile_element_row(const uint8_t* data, int64_t rows, int64_t per_row, int64_t size, int64_t row, uint8_t* out);

// The words' inner order, and back.
static inline uint32_t split_nibbles(uint32_t w) {
    uint32_t even = w & 0x0f0f0f0fu, odd = (w >> 4) & 0x0f0f0f0fu;
    even = (even | even >> 4) & 0x00ff00ffu; odd = (odd | odd >> 4) & 0x00ff00ffu;
    even = (even | even >> 8) & 0xffffu; odd = (odd | odd >> 8) & 0xffffu;
    return even | odd << 16;
}
static inline uint32_t join_nibbles(uint32_t w) {
    uint32_t even = w & 0xffffu, odd = w >> 16;
    even = (even | even << 8) & 0x00ff00ffu; odd = (odd | odd << 8) & 0x00ff00ffu;
    even = (even | even << 4) & 0x0f0f0f0fu; odd = (odd | odd << 4) & 0x0f0f0f0fu;
    return even | odd << 4;
}
static inline uint32_t swap_middle(uint32_t w) { return (w & 0xff0000ffu) | (w & 0xff00u) << 8 | (w >> 8 & 0xff00u); }

}  // namespace halfbyte
