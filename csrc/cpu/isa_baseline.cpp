#define LORASPAN_ISA baseline
#include "kernels.inl"
