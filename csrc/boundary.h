// What every binding checks: Python gives addresses with their sizes, and nothing is touched before they are checked.
#pragma once
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "matrix.h"

namespace halfbyte {

using Span = std::pair<uintptr_t, int64_t>;  // address, bytes

inline uint8_t* checked(Span s, int64_t needed, const char* what) {
    if (needed < 0 || s.second < needed || (needed && !s.first)) {
        throw std::invalid_argument(std::string(what) + " has " + std::to_string(s.second) + " bytes where " + std::to_string(needed) +
                                    " are needed");
    }
    return (uint8_t*)s.first;
}

inline int64_t product(int64_t a, int64_t b, const char* what) {
    int64_t r;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &r) || r > (int64_t(1) << 46))
        throw std::invalid_argument(std::string(what) + " is too large");
    return r;
}

inline Type type_of(const std::string& name) {
    if (name == "float32") return Type::f32;
    if (name == "bfloat16") return Type::bf16;
    if (name == "float16") return Type::f16;
    if (name == "float8_e8m0fnu") return Type::e8m0;
    throw std::invalid_argument("no kernel reads " + name);
}

inline void fill(float* table, const std::vector<float>& values, size_t n) {
    if (values.size() < n)
        throw std::invalid_argument("a table of " + std::to_string(values.size()) + " values where " + std::to_string(n) + " are needed");
    for (size_t i = 0; i < n; i++) table[i] = values[i];
}

}  // namespace halfbyte
