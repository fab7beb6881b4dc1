#define HB_ISA avx512
#include "isa.inc"
