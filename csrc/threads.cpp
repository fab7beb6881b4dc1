#include "threads.h"

#include <cstdlib>
#include <new>

#include "isa.h"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace halfbyte {
namespace {

// torch loads its OpenMP library for all to see. Calling that one, rather than linking one of our own, means that its
// threads serve both: nothing is oversubscribed, and a thread that still spins after torch's last loop takes ours.
using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
using Number = int (*)();

struct Pool {
    Fork fork = nullptr;
    Number thread = nullptr, count = nullptr;
    Pool() {
#if defined(__unix__) || defined(__APPLE__)
        fork = (Fork)dlsym(RTLD_DEFAULT, "GOMP_parallel");
        thread = (Number)dlsym(RTLD_DEFAULT, "omp_get_thread_num");
        count = (Number)dlsym(RTLD_DEFAULT, "omp_get_num_threads");
#endif
    }
    bool ok() const { return fork && thread && count; }
};

const Pool& pool() {
    static const Pool p;
    return p;
}

struct Work {
    const std::function<void(int64_t, int64_t)>* body;
    int64_t items;
};

void run(void* data) {
    const Work& w = *(const Work*)data;
    const int64_t n = pool().count(), i = pool().thread();  // nested in another loop there may be fewer than asked for
    const int64_t begin = w.items * i / n, end = w.items * (i + 1) / n;
    if (begin < end) (*w.body)(begin, end);
}

}  // namespace

void parallel(int threads, int64_t items, const std::function<void(int64_t, int64_t)>& body) {
    if (items <= 0) return;
    const int n = (int)(threads < items ? threads : items);
    if (n <= 1 || !pool().ok()) return body(0, items);
    Work w{&body, items};
    pool().fork(run, &w, (unsigned)n, 0);
}

uint8_t* scratch(int slot, size_t bytes) {
    struct Memory {
        void* data = nullptr;
        size_t size = 0;
        ~Memory() { free(data); }
    };
    thread_local Memory memory[8];
    Memory& m = memory[slot];
    if (m.size < bytes) {
        free(m.data);
        m.size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
        m.data = aligned_alloc(64, m.size);
        if (!m.data) throw std::bad_alloc();
    }
    return (uint8_t*)m.data;
}

const char* thread_source() {
    return pool().ok() ? "torch's OpenMP threads" : "one thread: torch's OpenMP library offers no GOMP_parallel here";
}

}  // namespace halfbyte
