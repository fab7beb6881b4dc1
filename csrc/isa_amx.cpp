#define HB_ISA amx
#include "isa.inc"
