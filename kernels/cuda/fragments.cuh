// Products that a warp makes of what its lanes hold, read straight from memory; and launches one after the other.
//
// Lane 4 g + t holds entries [8 t, 8 t + 8) of every 32 of some lines: rows of one matrix, columns of the other. Which
// of them meet in one instruction is nothing to their sum, as long as both sides are held alike.
#pragma once

#include <vector>

#include "rows.cuh"

namespace loraspan {

#ifdef LORASPAN_EMULATED

// What the lane has whose number differs by `apart`, a power of two.
inline float other_lane(float value, int apart) {
  const std::uint32_t words[1] = {float_to_bits(value)};
  return bits_to_float(emulation::lay_out(words)[(threadIdx.x % 32) ^ static_cast<unsigned>(apart)][0]);
}

inline void multiply_16x8x8_floats(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
  const std::uint32_t words[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const auto lanes = emulation::lay_out(words);
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  // of a float32 the tensor cores read 19 bits
  const auto entry = [&](int lane, int word) { return double{bits_to_float(lanes[lane][word] & 0xffffe000u)}; };
  for (int e = 0; e < 4; ++e) {
    double terms[9];
    for (int k = 0; k < 8; ++k)
      terms[k] = entry(4 * g + k % 4, k / 4 * 2 + e / 2) * entry(4 * (2 * t + e % 2) + k % 4, 4 + k / 4);
    terms[8] = c[e];
    c[e] = tensor_sum(terms, 9);
  }
}

// Word m of lane 4 g + t: entries (2 t, g) and (2 t + 1, g) of tile m, [8, 8], whose row r lane 8 m + r points at.
inline void load_across(std::uint32_t (&tile)[4], const void* row) {
  const auto address = reinterpret_cast<std::uintptr_t>(row);
  const std::uint32_t words[2] = {static_cast<std::uint32_t>(address), static_cast<std::uint32_t>(address >> 32)};
  const auto lanes = emulation::lay_out(words);
  const int g = static_cast<int>(threadIdx.x % 32 / 4), t = static_cast<int>(threadIdx.x % 4);
  for (int m = 0; m < 4; ++m) {
    const auto entry = [&](int r) {
      const auto* at = lanes[8 * m + r];
      const auto from = static_cast<std::uintptr_t>(at[0]) | static_cast<std::uintptr_t>(at[1]) << 32;
      return std::uint32_t{reinterpret_cast<const std::uint16_t*>(from)[g]};
    };
    tile[m] = entry(2 * t) | entry(2 * t + 1) << 16;
  }
}

inline void let_next_begin() {}
inline void wait_for_last() {}
inline void expect(const void*) {}

template <typename... Parameters>
int launch_after(std::int64_t bytes, void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
                 typename Exactly<Parameters>::type... arguments) {
  return launch_with(bytes, kernel, blocks, threads, stream, arguments...);
}

#else

// What the lane has whose number differs by `apart`, a power of two.
__device__ __forceinline__ float other_lane(float value, int apart) {
  return __shfl_xor_sync(0xffffffffu, value, apart);
}

// c [16, 8] += a [16, 8] b [8, 8]^T by a whole warp, of float32 with no more than 11 bits. Lane 4 g + t holds of a rows
// g and g + 8 at columns t (words 0, 1) and t + 4 (words 2, 3); of b row g at columns t and t + 4; c as in
// multiply_16x8x16 (PTX ISA, "Matrix fragments for mma.m16n8k8").
__device__ __forceinline__ void multiply_16x8x8_floats(float (&c)[4], const std::uint32_t (&a)[4],
                                                       const std::uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Word m of lane 4 g + t: entries (2 t, g) and (2 t + 1, g) of tile m, [8, 8], of 16 bits in shared memory, whose row r
// lane 8 m + r points at.
__device__ __forceinline__ void load_across(std::uint32_t (&tile)[4], const void* row) {
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tile[0]), "=r"(tile[1]), "=r"(tile[2]), "=r"(tile[3])
               : "r"(place)
               : "memory");
}

// Blocks of the next launch may begin once all of this one's have come here; what is written after is not theirs to
// read until they have waited.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the launch before this one has ended and all that it wrote can be read.
__device__ __forceinline__ void wait_for_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings the 128 bytes around an address to the L2 cache.
__device__ __forceinline__ void expect(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
}

// Whether a kernel has wait_for_last in it on the current card: code made for an older one has not. To be told takes as
// long as to launch, and is always the same: asked once by each thread.
inline int can_wait(const void* kernel, bool* can) {
  struct Known {
    const void* kernel;
    int device;
    bool can;
  };
  thread_local std::vector<Known> known;
  int device;
  if (const int error = cudaGetDevice(&device)) return error;
  for (const Known& one : known) {
    if (one.kernel != kernel || one.device != device) continue;
    *can = one.can;
    return 0;
  }
  cudaFuncAttributes found;
  if (const int error = cudaFuncGetAttributes(&found, kernel)) return error;
  *can = found.ptxVersion >= 90;
  known.push_back({kernel, device, *can});
  return 0;
}

// As launch_with, but where the kernel calls wait_for_last, and can, its blocks begin while the launch before is at
// work.
template <typename... Parameters>
int launch_after(std::int64_t bytes, void (*kernel)(Parameters...), std::int64_t blocks, int threads, void* stream,
                 typename Exactly<Parameters>::type... arguments) {
  if (blocks == 0) return 0;
  void* pointers[] = {&arguments...};
  const void* function = reinterpret_cast<const void*>(kernel);
  bool can = false;
  if (const int error = can_wait(function, &can)) return error;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &early;
  // what does not wait has to begin when the last launch has ended
  config.numAttrs = can ? 1 : 0;
  return cudaLaunchKernelExC(&config, function, pointers);
}

#endif

// The 11 bits that tensor cores read of a float32, in which all entries of half precision fit.
__device__ __forceinline__ float upper_bits(float value) { return bits_to_float(float_to_bits(value) & 0xffffe000u); }

// A float32 as kParts numbers of at most 11 bits, the largest first: three hold it exactly. What is no number is in the
// first alone.
template <int kParts>
struct Split {
  float part[kParts];

  __device__ __forceinline__ explicit Split(float value) {
    const bool finite = (float_to_bits(value) & 0x7f800000u) != 0x7f800000u;
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      part[i] = i == 0 || finite ? upper_bits(value) : 0.0f;
      value -= part[i];
    }
  }
};

// A float32 as three bfloat16, the largest first, which hold it exactly. What is no number is in the first alone.
struct Brains {
  std::uint16_t part[3];

  __device__ __forceinline__ explicit Brains(float value) {
    const bool finite = (float_to_bits(value) & 0x7f800000u) != 0x7f800000u;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const std::uint32_t upper = float_to_bits(value) >> 16;
      part[i] = finite ? static_cast<std::uint16_t>(upper) : i == 0 ? float_to_bfloat(value) : std::uint16_t{0};
      value -= bits_to_float(upper << 16);
    }
  }
};

// Entries as they are held, 8 to a run. Of two lines of a, g and g + 8 of a tile of 16, and one of each of kTiles tiles
// of 8 of b, `multiply` adds the products over 32 columns to the sums: 8 at a time by the tensor cores, from 0, and
// what they give in float32, to nearest.
template <bool kBrain>
struct Halves {
  static constexpr Dtype kDtype = kBrain ? loraspan::kBrain : kHalf;
  using Entry = std::uint16_t;
  using Run = Eight<Entry>;

  __device__ __forceinline__ static float value(Entry entry) {
    return kBrain ? brain_to_float(entry) : half_to_float(entry);
  }
  __device__ __forceinline__ static Entry rounded(float value) {
    return kBrain ? float_to_bfloat(value) : float_to_half(value);
  }

  template <int kTiles>
  __device__ __forceinline__ static void multiply(float (&sum)[kTiles][4], const Run (&a)[2], const Run (&b)[kTiles]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t left[2] = {a[0].quad[0].word[i], a[1].quad[0].word[i]};
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float part[4] = {};
        multiply_16x8x8<kBrain>(part, left, b[j].quad[0].word[i]);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] += part[e];
      }
    }
  }
};

// float32 in parts, of which all products that count are made, the small ones first: kRight is 1 where b has entries of
// half precision, else 3.
template <int kRight>
struct Floats {
  static constexpr Dtype kDtype = kFloat;
  using Entry = float;
  using Run = Eight<Entry>;

  __device__ __forceinline__ static float value(Entry entry) { return entry; }

  template <int kTiles, typename RunOfB, typename Value>
  __device__ __forceinline__ static void multiply(float (&sum)[kTiles][4], const Run (&a)[2], const RunOfB (&b)[kTiles],
                                                  const Value& value) {
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
      std::uint32_t left[3][4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const Split<3> parts(a[word % 2].entry[i + word / 2]);
#pragma unroll
        for (int p = 0; p < 3; ++p) left[p][word] = float_to_bits(parts.part[p]);
      }
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        std::uint32_t right[kRight][2];
#pragma unroll
        for (int word = 0; word < 2; ++word) {
          const Split<kRight> parts(value(b[j].entry[i + word]));
#pragma unroll
          for (int p = 0; p < kRight; ++p) right[p][word] = float_to_bits(parts.part[p]);
        }
        float part[4] = {};
#pragma unroll
        for (int order = 2; order >= 0; --order)
#pragma unroll
          for (int p = 0; p < kRight && p <= order; ++p) multiply_16x8x8_floats(part, left[order - p], right[p]);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] += part[e];
      }
    }
  }

  template <int kTiles>
  __device__ __forceinline__ static void multiply(float (&sum)[kTiles][4], const Run (&a)[2], const Run (&b)[kTiles]) {
    multiply(sum, a, b, [](float entry) { return entry; });
  }
};

}  // namespace loraspan
