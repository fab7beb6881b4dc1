#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace halfbyte {
namespace {

#if defined(HB_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
bool has_amx() {
#if defined(__linux__)
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1, int8 = d >> 25 & 1;
    constexpr int request_permission = 0x1023, tile_data = 18;  // the kernel gives a process tile registers on request
    return has_avx512() && bf16 && tile && int8 && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return false;
#endif
}
#endif

const Isa*& current() {
    static const Isa* in_use = isas().front();
    return in_use;
}

}  // namespace

std::vector<const Isa*> isas() {
    static const std::vector<const Isa*> found = [] {
        std::vector<const Isa*> v;
#if defined(HB_X86)
        if (has_amx()) v.push_back(isa_amx());
        if (has_avx512()) v.push_back(isa_avx512());
        if (has_avx2()) v.push_back(isa_avx2());
#endif
        v.push_back(isa_generic());
        return v;
    }();
    return found;
}

const Isa& isa() { return *current(); }

void use_isa(const std::string& name) {
    std::string known;
    for (const Isa* i : isas()) {
        if (name == i->name) { current() = i; return; }
        known += (known.empty() ? "" : ", ") + std::string(i->name);
    }
    throw std::invalid_argument("the instruction set '" + name + "' does not run here; these do: " + known);
}

}  // namespace halfbyte
