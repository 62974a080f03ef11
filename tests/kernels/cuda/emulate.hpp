// The names that kernels/cuda/device.cuh asks of CUDA, for g++: blocks one after the other, threads as fibers.
//
// What CUDA leaves open is made to hurt: shared memory begins as NaN, threads and blocks run in the order that the test
// sets, and tensor cores cut off what the worst of them may.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "fibers.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__

struct Position {
  unsigned x, y, z;
};
inline Position threadIdx, blockIdx, blockDim, gridDim;

namespace loraspan {

namespace emulation {

// 0 forward, 1 in reverse, 2 at random; set by the test.
inline int order = 0;
// the shared memory of the block that runs
inline void* block_memory = nullptr;

// No larger than it has to be, for the sanitizer; all bits set, which is NaN in every format.
inline void take_memory(std::size_t bytes) {
  block_memory = std::aligned_alloc(16, (bytes + 15) / 16 * 16);
  std::memset(block_memory, 0xff, bytes);
}

// What each lane of each warp has laid out for the others. Two places in turn: nobody is more than one step ahead.
constexpr int kWords = 8;
// what each thread has begun to copy
inline std::vector<std::pair<void*, const void*>> copies[1024];

inline std::uint32_t laid_out[2][1024][kWords];
inline unsigned steps[1024];

template <int kCount>
const std::uint32_t (*lay_out(const std::uint32_t (&words)[kCount])) [kWords] {
  static_assert(kCount <= kWords, "a lane's place is too small");
  const unsigned self = threadIdx.x, place = steps[self]++ % 2;
  std::memcpy(laid_out[place][self], words, sizeof words);
  Fibers::instance().wait(State::at_warp);
  return laid_out[place] + self / 32 * 32;
}

}  // namespace emulation

inline float bits_to_float(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline std::uint32_t float_to_bits(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = static_cast<std::uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | magnitude << 13);
  // the exponent bias moves by 112: multiplying by 2^112 also gets the subnormals right
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * 0x1p112f));
}

inline std::uint16_t float_to_half(float value) {
  const std::uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7f800000u) return sign | 0x7fffu;
  // from half of a unit above the largest half, 65504, on
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
  if (magnitude < 0x38800000u)  // subnormal: units of 2^-24; the host's mode is to nearest, ties to even
    return sign | static_cast<std::uint16_t>(std::nearbyint(std::fabs(value) * 0x1p24f));
  return sign | static_cast<std::uint16_t>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

inline std::uint16_t float_to_bfloat(float value) {
  const std::uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

template <typename T>
const T* in_global(const T* pointer) {
  return pointer;
}

// As late as can be: a copy happens when its thread waits for it.
inline void copy_aside(void* to, const void* from) { emulation::copies[threadIdx.x].push_back({to, from}); }

// A pair of nothing ends a group of copies.
inline void end_of_copies() { emulation::copies[threadIdx.x].push_back({nullptr, nullptr}); }

template <int kBut = 0>
void wait_for_copies() {
  struct alignas(16) Quad {
    char byte[16];
  };
  auto& begun = emulation::copies[threadIdx.x];
  // up to the end of the last group that is waited for; nothing after it has happened yet
  std::size_t stop = begun.size();
  for (int left = kBut + 1; kBut > 0 && stop > 0; --stop)
    if (!begun[stop - 1].first && --left == 0) break;
  for (std::size_t i = 0; i < stop; ++i)
    if (begun[i].first) *static_cast<Quad*>(begun[i].first) = *static_cast<const Quad*>(begun[i].second);
  begun.erase(begun.begin(), begun.begin() + static_cast<std::ptrdiff_t>(stop));
}

inline float double_to_float(double value) { return static_cast<float>(value); }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline double fused(double a, double b, double c) { return std::fma(a, b, c); }

// 2^exponent, of a normal number.
inline double power_of_two(int exponent) {
  const std::uint64_t bits = static_cast<std::uint64_t>(exponent + 1023) << 52;
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A sum as tensor cores make it: aligned to the largest term with one bit more than float32 has, cut there, added, cut.
inline float tensor_sum(const double* terms, int count) {
  double largest = 0, plain = 0;
  for (int i = 0; i < count; ++i) {
    plain += terms[i];
    largest = std::fabs(terms[i]) > largest ? std::fabs(terms[i]) : largest;
  }
  if (!std::isfinite(plain) || largest == 0) return static_cast<float>(plain);
  const int exponent = std::ilogb(largest);
  const double finest = power_of_two(24 - exponent);
  std::int64_t total = 0;
  for (int i = 0; i < count; ++i) total += static_cast<std::int64_t>(terms[i] * finest);
  const double sum = static_cast<double>(total) * power_of_two(exponent - 24);
  const auto nearest = static_cast<float>(sum);
  return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.0f) : nearest;
}

template <bool kBrain>
double entry_of(std::uint32_t words, int i) {
  const std::uint32_t bits = words >> (16 * i) & 0xffffu;
  return kBrain ? bits_to_float(bits << 16) : half_to_float(static_cast<std::uint16_t>(bits));
}

// Every lane makes its own four entries of c from what all have laid out: kHalves runs of 8 columns.
template <bool kBrain, int kHalves>
void multiply_laid_out(float (&c)[4], const std::uint32_t (*lanes)[emulation::kWords]) {
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  for (int e = 0; e < 4; ++e)
    for (int half = 0; half < kHalves; ++half) {
      double terms[9];
      for (int k = 0; k < 8; ++k) {
        const std::uint32_t left = lanes[4 * g + k / 2][2 * half + e / 2];
        const std::uint32_t right = lanes[4 * (2 * t + e % 2) + k / 2][4 + half];
        terms[k] = entry_of<kBrain>(left, k % 2) * entry_of<kBrain>(right, k % 2);
      }
      terms[8] = c[e];
      c[e] = tensor_sum(terms, 9);
    }
}

template <bool kBrain>
void multiply_16x8x16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const std::uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  multiply_laid_out<kBrain, 2>(c, emulation::lay_out(words));
}

template <bool kBrain>
void multiply_16x8x8(float (&c)[4], const std::uint32_t (&a)[2], std::uint32_t b) {
  const std::uint32_t words[6] = {a[0], a[1], 0, 0, b, 0};
  multiply_laid_out<kBrain, 1>(c, emulation::lay_out(words));
}

template <typename T>
T& shared() {
  if (!emulation::block_memory) emulation::take_memory(sizeof(T));
  return *static_cast<T*>(emulation::block_memory);
}

template <typename T>
struct Exactly {
  using type = T;
};

// Each lane adds what it has to that of the lane so far away, as shuffles do.
inline float sum_over_warp(float value) {
  for (unsigned apart = 16; apart > 0; apart /= 2) {
    const std::uint32_t words[1] = {float_to_bits(value)};
    value += bits_to_float(emulation::lay_out(words)[threadIdx.x % 32 ^ apart][0]);
  }
  return value;
}

inline float* given() { return static_cast<float*>(emulation::block_memory); }

template <typename... Parameters>
int launch_with(std::int64_t bytes, void (*kernel)(Parameters...), std::int64_t blocks, int threads, void*,
                typename Exactly<Parameters>::type... arguments) {
  using namespace emulation;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  gridDim = {static_cast<unsigned>(blocks), 1, 1};
  for (std::int64_t i = 0; i < blocks; ++i) {
    blockIdx = {static_cast<unsigned>(order == 1 ? blocks - 1 - i : i), 0, 0};
    if (bytes) take_memory(static_cast<std::size_t>(bytes));
    const bool ended = Fibers::instance().run(
        threads, [&] { kernel(arguments...); }, [](int lane) { threadIdx.x = static_cast<unsigned>(lane); }, order);
    std::free(block_memory);
    block_memory = nullptr;
    for (auto& begun : copies) begun.clear();
    if (!ended) return 719;  // cudaErrorLaunchFailure: some wait for others that are elsewhere
  }
  return 0;
}

template <typename... Parameters>
int launch(void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
           typename Exactly<Parameters>::type... arguments) {
  return launch_with(0, kernel, blocks, threads, stream, arguments...);
}

}  // namespace loraspan

inline void __syncthreads() { loraspan::emulation::Fibers::instance().wait(loraspan::emulation::State::at_block); }
inline void __syncwarp() { loraspan::emulation::Fibers::instance().wait(loraspan::emulation::State::at_warp); }
