#include "layout.h"

#include <vector>

#include "threads.h"

namespace halfbyte {
namespace {

// Runs body(bytes of a tile, its rows, scratch of as many bytes) for every tile of `row_bytes` bytes a row.
template <class Body>
void each_tile(uint8_t* data, int64_t rows, int64_t row_bytes, int threads, Body body) {
    parallel(threads, ceil_div(rows, TILE), [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> scratch((size_t)(TILE * row_bytes));
        for (int64_t t = begin; t < end; t++) {
            const int64_t r = least(TILE, rows - t * TILE);
            uint8_t* tile = data + t * TILE * row_bytes;
            body(tile, r, scratch.data());
            memcpy(tile, scratch.data(), (size_t)(r * row_bytes));
        }
    });
}

}  // namespace

void tile_codes(uint8_t* codes, int64_t rows, int64_t row_bytes, int bits, bool undo, int threads) {
    const int64_t words = row_bytes / 4;
    each_tile(codes, rows, row_bytes, threads, [=](const uint8_t* tile, int64_t r, uint8_t* out) {
        for (int64_t row = 0; row < r; row++) {
            for (int64_t w = 0; w < words; w++) {
                const int64_t canonical = 4 * (row * words + w), tiled = 4 * (w * r + row);
                uint32_t v;
                memcpy(&v, tile + (undo ? tiled : canonical), 4);
                v = bits == 8 ? swap_middle(v) : undo ? join_nibbles(v) : split_nibbles(v);
                memcpy(out + (undo ? canonical : tiled), &v, 4);
            }
        }
    });
}

void tile_elements(uint8_t* data, int64_t rows, int64_t per_row, int64_t size, bool undo, int threads) {
    each_tile(data, rows, per_row * size, threads, [=](const uint8_t* tile, int64_t r, uint8_t* out) {
        for (int64_t row = 0; row < r; row++) {
            for (int64_t g = 0; g < per_row; g++) {
                const int64_t canonical = size * (row * per_row + g), tiled = size * (g * r + row);
                memcpy(out + (undo ? canonical : tiled), tile + (undo ? tiled : canonical), (size_t)size);
            }
        }
    });
}

void tile_six_bits(uint8_t* data, int64_t rows, int64_t blocks, bool undo, int threads) {
    each_tile(data, rows, blocks * 6, threads, [=](const uint8_t* tile, int64_t r, uint8_t* out) {
        for (int64_t row = 0; row < r; row++) {
            for (int64_t b = 0; b < blocks; b++) {
                const int64_t canonical = 6 * (row * blocks + b), low_at = 6 * b * r + 4 * row, high_at = 6 * b * r + 4 * r + 2 * row;
                uint64_t six = 0, low = 0, high = 0;
                if (!undo) {
                    memcpy(&six, tile + canonical, 6);
                    for (int i = 0; i < 8; i++) {
                        low |= (six >> (6 * i) & 15) << (4 * i);
                        high |= (six >> (6 * i + 4) & 3) << (2 * i);
                    }
                    memcpy(out + low_at, &low, 4);
                    memcpy(out + high_at, &high, 2);
                } else {
                    memcpy(&low, tile + low_at, 4);
                    memcpy(&high, tile + high_at, 2);
                    for (int i = 0; i < 8; i++) six |= ((low >> (4 * i) & 15) | (high >> (2 * i) & 3) << 4) << (6 * i);
                    memcpy(out + canonical, &six, 6);
                }
            }
        }
    });
}

void untile_row(const uint8_t* codes, int64_t rows, int64_t row_bytes, int bits, int64_t row, uint8_t* out) {
    const int64_t t = row / TILE, n = least(TILE, rows - t * TILE);
    const uint8_t* p = codes + t * TILE * row_bytes + 4 * (row % TILE);
    for (int64_t w = 0; w < row_bytes / 4; w++, p += 4 * n, out += 4) {
        uint32_t v;
        memcpy(&v, p, 4);
        v = bits == 8 ? swap_middle(v) : join_nibbles(v);
        memcpy(out, &v, 4);
    }
}

void untile_element_row(const uint8_t* data, int64_t rows, int64_t per_row, int64_t size, int64_t row, uint8_t* out) {
    const int64_t t = row / TILE, n = least(TILE, rows - t * TILE);
    const uint8_t* p = data + t * TILE * per_row * size + size * (row % TILE);
    for (int64_t g = 0; g < per_row; g++, p += size * n, out += size) memcpy(out, p, (size_t)size);
}

}  // namespace halfbyte
