// Products of two tiles in shared memory, c += a b^T, each with its own way to keep the sums.
//
// A block of 256 threads makes a tile of kRows x kCols sums. `Plain` multiplies in T; `Tensor` hands half-precision
// entries to the tensor cores, whose products of two such numbers are exact in float32.
#pragma once

#include "rows.cuh"

namespace loraspan {

// Products and sums in T: 16 x 16 threads, thread (y, x) with rows y + 16 i and columns x + 16 j of the tile.
template <typename T, int kWide = 64>
struct Plain {
  using Entry = T;
  static constexpr int kRows = 64, kCols = kWide, kDepth = sizeof(T) == 4 ? 32 : 16;
  static constexpr int kHeight = kRows / 16, kWidth = kCols / 16, kSums = kHeight * kWidth;
  // entries in 16 bytes
  static constexpr int kPack = 16 / static_cast<int>(sizeof(T));
  // columns after which sums go to float64, in whole depths of a tile; none for those that are float64
  static constexpr int kFlush = sizeof(T) == 4 ? 128 : 0;
  static constexpr bool kAside = false;
  using Left = Tile<T, kRows, kDepth>;
  using Right = Tile<T, kCols, kDepth>;

  struct alignas(16) Pack {
    T value[kPack];
  };

  T sum[kHeight][kWidth] = {};

  // One fused multiply-add per product, columns in their order.
  __device__ __forceinline__ void multiply(const Left& a, const Right& b) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll 1
    for (int k = 0; k < kDepth; k += kPack) {
      Pack right[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) right[j] = *reinterpret_cast<const Pack*>(&b.entry[x + 16 * j][k]);
#pragma unroll
      for (int i = 0; i < kHeight; ++i) {
        const Pack left = *reinterpret_cast<const Pack*>(&a.entry[y + 16 * i][k]);
#pragma unroll
        for (int p = 0; p < kPack; ++p)
#pragma unroll
          for (int j = 0; j < kWidth; ++j) sum[i][j] = fused(left.value[p], right[j].value[p], sum[i][j]);
      }
    }
  }

  // Calls f(row of the tile, column of the tile, number of the sum, sum) for each sum of this thread.
  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
#pragma unroll
    for (int i = 0; i < kHeight; ++i)
#pragma unroll
      for (int j = 0; j < kWidth; ++j) f(y + 16 * i, x + 16 * j, kWidth * i + j, sum[i][j]);
  }
};

// Products by mma.sync, sums in float32: 8 warps, 4 x 2 over the tile, each with kHeight x 4 products of 16 x 8.
//
// Tensor cores align the products of 8 columns to the largest of them and cut off what is below float32's last bit but
// one, then cut the sum to float32 (Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor cores, 2021,
// section 4): at most one unit of roundoff per product and two per 8 columns, so k columns end within 1.25 k units.
//
// kHigh is 1 or 2: rows of the tile in 64s. The taller reads a quarter less from shared memory for each product, which
// is what these wait for; its sums take half of all registers.
template <bool kBrain, int kHigh = 1, int kDeep = 64, int kColumnsToFlush = 64>
struct Tensor {
  using Entry = std::uint16_t;
  static constexpr int kRows = 64 * kHigh, kCols = 64, kDepth = kDeep;
  static constexpr int kHeight = kHigh, kWidth = 4, kSums = kHeight * kWidth * 4;
  static constexpr int kFlush = kColumnsToFlush;
  // both sides are of these entries and read by 16 bytes
  static constexpr bool kAside = kHigh > 1;
  using Left = Tile<Entry, kRows, kDepth>;
  using Right = Tile<Entry, kCols, kDepth>;

  float sum[kHeight][kWidth][4] = {};

  __device__ __forceinline__ static std::uint32_t pair(const Entry* entries) {
    return *reinterpret_cast<const std::uint32_t*>(entries);
  }

  // Sums run on through the tensor cores.
  __device__ __forceinline__ void multiply(const Left& a, const Right& b) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int y = warp / 2 * 16 * kHeight + g, x = warp % 2 * 32 + g;
#pragma unroll kHeight == 1 ? 4 : 1
    for (int k = 0; k < kDepth; k += 16) {
      std::uint32_t right[kWidth][2];
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
#pragma unroll
        for (int word = 0; word < 2; ++word) right[j][word] = pair(&b.entry[x + 8 * j][k + word * 8 + 2 * t]);
#pragma unroll
      for (int i = 0; i < kHeight; ++i) {
        std::uint32_t left[4];
#pragma unroll
        for (int word = 0; word < 4; ++word)
          left[word] = pair(&a.entry[y + 16 * i + word % 2 * 8][k + word / 2 * 8 + 2 * t]);
#pragma unroll
        for (int j = 0; j < kWidth; ++j) multiply_16x8x16<kBrain>(sum[i][j], left, right[j]);
      }
    }
  }

  // Sums of 8 products from the tensor cores, added in float32 to nearest: k products end within k + 1 units.
  __device__ __forceinline__ void multiply_by_eights(const Left& a, const Right& b, int depth) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    const int y = warp / 2 * 16 * kHeight + g, x = warp % 2 * 32 + g;
    for (int k = 0; k < depth; k += 8) {
      std::uint32_t left[kHeight][2];
#pragma unroll
      for (int i = 0; i < kHeight; ++i)
#pragma unroll
        for (int word = 0; word < 2; ++word) left[i][word] = pair(&a.entry[y + 16 * i + word * 8][k + 2 * t]);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const std::uint32_t right = pair(&b.entry[x + 8 * j][k + 2 * t]);
#pragma unroll
        for (int i = 0; i < kHeight; ++i) {
          float eight[4] = {};
          multiply_16x8x8<kBrain>(eight, left[i], right);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[i][j][e] += eight[e];
        }
      }
    }
  }

  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kHeight; ++i)
#pragma unroll
      for (int j = 0; j < kWidth; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          f(warp / 2 * 16 * kHeight + 16 * i + e / 2 * 8 + g, warp % 2 * 32 + 8 * j + 2 * t + e % 2,
            (kWidth * i + j) * 4 + e, sum[i][j][e]);
  }
};

template <typename Policy>
using PairsOf = Pairs<typename Policy::Left, typename Policy::Right, Policy::kAside ? 3 : 2>;

}  // namespace loraspan
