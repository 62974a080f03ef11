// What the kernels ask of the machine beneath them: conversions, one matrix instruction, shared memory, a launch.
//
// tests/kernels/cuda/emulate.hpp defines the same names for g++, so that these sources run where there is no GPU.
#pragma once

#include <cstdint>

#ifdef LORASPAN_EMULATED
#include "emulate.hpp"
#else

#include <cuda_runtime.h>

namespace loraspan {

__device__ __forceinline__ float half_to_float(std::uint16_t half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}

// Round to nearest, ties to even.
__device__ __forceinline__ std::uint16_t float_to_half(float value) {
  std::uint16_t half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}

__device__ __forceinline__ std::uint16_t float_to_bfloat(float value) {
  std::uint16_t bfloat;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bfloat) : "f"(value));
  return bfloat;
}

__device__ __forceinline__ float bits_to_float(std::uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ std::uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// The same pointer, of which the compiler then knows that it is not into shared memory.
template <typename T>
__device__ __forceinline__ const T* in_global(const T* pointer) {
  __builtin_assume(__isGlobal(pointer));
  return pointer;
}

// Copies 16 bytes to shared memory while the thread goes on; they are there after wait_for_copies and a barrier, which
// waits for all that was begun before the last kBut ends of copies.
__device__ __forceinline__ void copy_aside(void* to, const void* from) {
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
}

__device__ __forceinline__ void end_of_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kBut = 0>
__device__ __forceinline__ void wait_for_copies() {
  if constexpr (kBut == 0)
    asm volatile("cp.async.wait_all;" ::: "memory");
  else
    asm volatile("cp.async.wait_group %0;" ::"n"(kBut) : "memory");
}

// Nearest float32, ties to even, whatever the mode of the host compiler's casts.
__device__ __forceinline__ float double_to_float(double value) { return __double2float_rn(value); }

// One fused multiply-add, in float32 or float64.
__device__ __forceinline__ float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return __fma_rn(a, b, c); }

// c [16, 8] += a [16, 16] b [8, 16]^T by a whole warp. Lane 4 g + t holds, two entries to a word: of a, rows g and
// g + 8 at columns 2 t (words 0, 1) and 2 t + 8 (words 2, 3); of b, row g at columns 2 t and 2 t + 8; of c, row g and
// row g + 8 at columns 2 t and 2 t + 1 (PTX ISA, "Matrix fragments for mma.m16n8k16").
template <bool kBrain>
__device__ __forceinline__ void multiply_16x8x16(float (&c)[4], const std::uint32_t (&a)[4],
                                                 const std::uint32_t (&b)[2]) {
  if constexpr (kBrain)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same over 8 columns: words 0 and 1 of a, word 0 of b.
template <bool kBrain>
__device__ __forceinline__ void multiply_16x8x8(float (&c)[4], const std::uint32_t (&a)[2], std::uint32_t b) {
  if constexpr (kBrain)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

// The block's one object in shared memory; it holds nothing in particular at first.
template <typename T>
__device__ __forceinline__ T& shared() {
  __shared__ alignas(16) unsigned char memory[sizeof(T)];
  return *reinterpret_cast<T*>(memory);
}

// The sum of a value over the lanes of a warp, the same in each of them: halves are added to halves.
__device__ __forceinline__ float sum_over_warp(float value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(0xffffffffu, value, apart);
  return value;
}

// The shared memory that launch_with gives the block; it holds nothing in particular at first.
__device__ __forceinline__ float* given() {
  extern __shared__ float memory_at_launch[];
  return memory_at_launch;
}

template <typename T>
struct Exactly {
  using type = T;
};

// Puts `blocks` blocks of `threads` threads on the stream, each with `bytes` of shared memory beside what the kernel
// names, and gives the error, if any, without waiting.
template <typename... Parameters>
int launch_with(std::int64_t bytes, void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
                typename Exactly<Parameters>::type... arguments) {
  if (blocks == 0) return 0;
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                          dim3(static_cast<unsigned>(threads)), pointers, static_cast<std::size_t>(bytes),
                          static_cast<cudaStream_t>(stream));
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
           typename Exactly<Parameters>::type... arguments) {
  return launch_with(0, kernel, blocks, threads, stream, arguments...);
}

}  // namespace loraspan

#endif
