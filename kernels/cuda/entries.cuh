// Entries of any dtype in memory, and the rounding of sums to what is stored.
#pragma once

#include "device.cuh"

namespace loraspan {

enum Dtype : std::int64_t { kHalf = 0, kBrain = 1, kFloat = 2, kDouble = 3 };

struct alignas(16) Quad {
  std::uint32_t word[4];
};

// The first rounding of two: to odd, so that the second lands where one would have (Boldo and Melquiond 2008,
// theorem 3).
__device__ __forceinline__ float round_to_odd(double value) {
  const float nearest = double_to_float(value);
  const double wide = nearest;
  std::uint32_t bits = float_to_bits(nearest);
  // from an even neighbour that is not exact, one step to the other side of the value; NaN compares false
  if ((wide < value || wide > value) && (bits & 1u) == 0) {
    const bool inward = (wide < 0 ? -wide : wide) > (value < 0 ? -value : value);
    bits = inward ? bits - 1u : bits + 1u;
  }
  return bits_to_float(bits);
}

__device__ __forceinline__ float once(float value) { return value; }
__device__ __forceinline__ float once(double value) { return round_to_odd(value); }

// Writes entry `index` of `data`, rounded once.
template <typename T>
__device__ __forceinline__ void put(void* data, std::int64_t index, Dtype dtype, T value) {
  switch (dtype) {
    case kHalf:
      static_cast<std::uint16_t*>(data)[index] = float_to_half(once(value));
      break;
    case kBrain:
      static_cast<std::uint16_t*>(data)[index] = float_to_bfloat(once(value));
      break;
    case kFloat:
      static_cast<float*>(data)[index] = sizeof(T) == 8 ? double_to_float(value) : static_cast<float>(value);
      break;
    default:
      static_cast<double*>(data)[index] = value;
  }
}

__device__ __forceinline__ float brain_to_float(std::uint32_t bits) { return bits_to_float(bits << 16); }

// Entry `index` of `data` as T; std::uint16_t stands for the bits of a half-precision entry as they are.
template <typename T>
__device__ __forceinline__ T get(const void* data, std::int64_t index, Dtype dtype) {
  if constexpr (sizeof(T) == 2) return in_global(static_cast<const std::uint16_t*>(data))[index];
  switch (dtype) {
    case kHalf:
      return static_cast<T>(half_to_float(in_global(static_cast<const std::uint16_t*>(data))[index]));
    case kBrain:
      return static_cast<T>(brain_to_float(in_global(static_cast<const std::uint16_t*>(data))[index]));
    case kFloat:
      return static_cast<T>(in_global(static_cast<const float*>(data))[index]);
    default:
      if constexpr (sizeof(T) == 4) return double_to_float(in_global(static_cast<const double*>(data))[index]);
      return static_cast<T>(in_global(static_cast<const double*>(data))[index]);
  }
}

// Whether entries of this dtype go into a tile of T as they are; of half precision, tiles have the bits.
template <typename T>
__device__ __forceinline__ bool as_it_is(std::int64_t dtype) {
  return sizeof(T) == 2 || dtype == (sizeof(T) == 4 ? kFloat : kDouble);
}

template <typename T>
union Eight {
  T entry[8];
  Quad quad[sizeof(T) / 2];
};

// Entries [index, index + 8) of `data`, of which the first is aligned to 16 bytes.
template <typename T>
__device__ __forceinline__ Eight<T> get_eight(const void* data, std::int64_t index, Dtype dtype) {
  Eight<T> out;
  if constexpr (sizeof(T) == 2) {
    out.quad[0] = *in_global(reinterpret_cast<const Quad*>(static_cast<const std::uint16_t*>(data) + index));
  } else if (dtype == kHalf || dtype == kBrain) {
    const Quad got = *in_global(reinterpret_cast<const Quad*>(static_cast<const std::uint16_t*>(data) + index));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const std::uint32_t bits = got.word[i / 2] >> (i % 2 * 16) & 0xffffu;
      const std::uint16_t half = static_cast<std::uint16_t>(bits);
      out.entry[i] = static_cast<T>(dtype == kHalf ? half_to_float(half) : brain_to_float(bits));
    }
  } else if (dtype == kFloat) {
    const Quad* from = in_global(reinterpret_cast<const Quad*>(static_cast<const float*>(data) + index));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Quad got = from[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) out.entry[4 * i + j] = static_cast<T>(bits_to_float(got.word[j]));
    }
  } else {
    struct alignas(16) Pair {
      double value[2];
    };
    const Pair* from = in_global(reinterpret_cast<const Pair*>(static_cast<const double*>(data) + index));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair got = from[i];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if constexpr (sizeof(T) == 4)
          out.entry[2 * i + j] = double_to_float(got.value[j]);
        else
          out.entry[2 * i + j] = static_cast<T>(got.value[j]);
      }
    }
  }
  return out;
}

}  // namespace loraspan
