#define LORASPAN_ISA avx512
#include "kernels.inl"
