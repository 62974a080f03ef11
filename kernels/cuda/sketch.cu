// sketch: Y = X Omega, an Omega of random signs drawn where they are used: Philox4x32-10 (Salmon, Moraes, Dror, Shaw,
// Parallel random numbers: as easy as 1, 2, 3, 2011), counter (j low, j high, c / 128, 0), key (seed low, seed high);
// bit c % 128 set is -1. The power step X (X^T Q) is one product of combine.cu and one of gram.cu.
//
// Omega costs no bytes: b R d are read and 8 R l written, for R d l products; at l = 42 and half precision on the
// tensor cores max(b R d / B, R d l / F) is the bytes on every card, 4 us for R = 1600, d = 4096 at 3.35e12 bytes a
// second. A sign takes one operation to expand and a block of 128 about 60 to draw, each once per tile of 64 rows. On
// an H100 half precision reaches 0.14 of the floor (24 matrices 0.19), and float32 0.20 (0.27).
#include "dots.cuh"

namespace loraspan {

// The 64 signs of a tile's columns c in rows [first, first + kThreads) of Omega, one row to a thread at a time.
struct SignWords {
  std::uint32_t word[kThreads][2];
};

// Bits [c, c + 64) of row j; c is a multiple of 64.
__device__ __forceinline__ void draw(std::uint64_t seed, std::uint64_t j, std::uint64_t c, std::uint32_t (&out)[2]) {
  std::uint32_t word[4] = {static_cast<std::uint32_t>(j), static_cast<std::uint32_t>(j >> 32),
                           static_cast<std::uint32_t>(c / 128), 0};
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{word[0]} * 0xD2511F53u, b = std::uint64_t{word[2]} * 0xCD9E8D57u;
    word[0] = static_cast<std::uint32_t>(b >> 32) ^ word[1] ^ key[0];
    word[1] = static_cast<std::uint32_t>(b);
    word[2] = static_cast<std::uint32_t>(a >> 32) ^ word[3] ^ key[1];
    word[3] = static_cast<std::uint32_t>(a);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  const bool second = c % 128 != 0;
  out[0] = second ? word[2] : word[0];
  out[1] = second ? word[3] : word[1];
}

// +1 or -1 as an entry of a tile.
template <typename Policy>
struct Sign;
template <typename T, int kWide>
struct Sign<Plain<T, kWide>> {
  __device__ __forceinline__ static T of(std::uint32_t bit) { return bit ? T{-1} : T{1}; }
};
template <bool kBrain, int kHigh, int kDeep, int kFlush>
struct Sign<Tensor<kBrain, kHigh, kDeep, kFlush>> {
  __device__ __forceinline__ static std::uint16_t of(std::uint32_t bit) {
    return static_cast<std::uint16_t>((kBrain ? 0x3f80u : 0x3c00u) | bit << 15);
  }
};

// The right side of a product: column c of Omega as row c.
template <typename Policy>
struct SignsOnTheRight {
  using Shared = SignWords;
  static constexpr int kWidest = 64;

  __device__ SignsOnTheRight(const Dots&, const Row*, Shared& memory, std::int64_t) : words{memory} {}

  __device__ __forceinline__ void stage_at(typename Policy::Right& tile, const Dots& job, std::int64_t first,
                                           std::int64_t begin, std::int64_t column, std::int64_t) const {
    static_assert(Policy::kCols == 64 && kThreads % Policy::kDepth == 0, "one draw serves whole tiles of 64 columns");
    const int offset = static_cast<int>((column - begin) % kThreads);
    if (offset == 0) {
      draw(static_cast<std::uint64_t>(job.seed), static_cast<std::uint64_t>(column + threadIdx.x),
           static_cast<std::uint64_t>(first), words.word[threadIdx.x]);
      __syncthreads();
    }
    // signs past the last column meet the zeros of the left side; a thread makes 8 rows of a column of Omega
    using Entry = typename Policy::Entry;
#pragma unroll
    for (int unit = threadIdx.x; unit < Policy::kCols * Policy::kDepth / 8; unit += kThreads) {
      const int c = unit % Policy::kCols, k = unit / Policy::kCols * 8;
      Eight<Entry> made;
#pragma unroll
      for (int i = 0; i < 8; ++i) made.entry[i] = Sign<Policy>::of(words.word[offset + k + i][c / 32] >> c % 32 & 1u);
      Quad* to = reinterpret_cast<Quad*>(&tile.entry[c][k]);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Entry)) / 2; ++i) to[i] = made.quad[i];
    }
  }

  Shared& words;
};

}  // namespace loraspan

extern "C" int loraspan_cuda_sketch(std::int64_t path, const loraspan::Dots* jobs, std::int64_t count,
                                    std::int64_t blocks, std::int64_t sums, const loraspan::Row* rows, void* stream) {
  return loraspan::launch_dots<loraspan::SignsOnTheRight, 32>(path, jobs, count, blocks, sums, rows, stream);
}
