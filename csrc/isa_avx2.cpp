#define HB_ISA avx2
#include "isa.inc"
