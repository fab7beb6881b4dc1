// Work on torch's own threads: a second pool beside it would fight it for the cores.
#pragma once
#include <cstdint>
#include <functional>

namespace halfbyte {

// Splits [0, items) into at most `threads` runs of equal length and calls body(begin, end) for each, at once.
void parallel(int threads, int64_t items, const std::function<void(int64_t, int64_t)>& body);

// Where the threads come from: "OpenMP, as torch has it", or why there is only one.
const char* thread_source();

}  // namespace halfbyte
