#define LORASPAN_ISA avx512bf16
#include "kernels.inl"
