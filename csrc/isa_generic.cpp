#define HB_ISA generic
#include "isa.inc"
