#define LORASPAN_ISA avx2
#include "kernels.inl"
