// The first launch of shared_lora: x V by slabs of d, and the products of x with private right ends.
#pragma once

#include <type_traits>

#include "shared_lora_many.cuh"

namespace loraspan {

// `count` entries of a line, of any stride and dtype, and zeros. A call, so that what converts them takes no registers
// of those who read whole runs.
template <typename Run>
__device__ __noinline__ void one_by_one(Run& run, const void* line, std::int64_t at, std::int64_t stride, int count,
                                        Dtype dtype) {
  using Entry = std::decay_t<decltype(Run{}.entry[0])>;
  for (int i = 0; i < 8; ++i) run.entry[i] = i < count ? get<Entry>(line, at + i * stride, dtype) : Entry{};
}

// Entries [k, k + 8) of row `row` of x; kApart: one by one in a call.
template <bool kApart, typename Run>
__device__ __forceinline__ Run run_of_x(const SharedLora& call, std::int64_t row, std::int64_t k, std::int64_t end) {
  using Entry = std::decay_t<decltype(Run{}.entry[0])>;
  Run run{};
  if (row >= call.rows || k >= end) return run;
  const Row line = lines_of(call.x, 0, false)(row);
  if (call.x.reading == kEights) return get_eight<Entry>(line.data, k, Dtype(line.dtype));
  if constexpr (kApart) {
    Run apart;
    const int count = end - k < 8 ? static_cast<int>(end - k) : 8;
    one_by_one(apart, line.data, k * line.stride, line.stride, count, Dtype(line.dtype));
    run = apart;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (k + i < end) run.entry[i] = get<Entry>(line.data, (k + i) * line.stride, Dtype(line.dtype));
  }
  return run;
}

// Entries [k, k + 8) of columns [column, column + kTiles) of V; kApart: as above.
template <bool kApart, int kTiles, typename Run>
__device__ __forceinline__ void runs_of_v(const SharedLora& call, std::int64_t column, std::int64_t k, std::int64_t end,
                                          Run (&run)[kTiles]) {
  using Entry = std::decay_t<decltype(Run{}.entry[0])>;
  const Matrix& v = call.v;
  const auto dtype = Dtype(v.dtype);
  if (v.reading == kEightsAcross && as_it_is<Entry>(dtype)) {
    // V has a multiple of 8 columns: a lane has all of its own or none
    struct alignas(kTiles * sizeof(Entry)) Across {
      Entry entry[kTiles];
    };
    Across row[8] = {};
    if (column < call.rank_in && k < end)
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (k + i < end)
          row[i] = *in_global(
              reinterpret_cast<const Across*>(static_cast<const Entry*>(v.data) + (k + i) * v.stride + column));
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) run[j].entry[i] = row[i].entry[j];
    return;
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    run[j] = Run{};
    if (column + j >= call.rank_in || k >= end) continue;
    if (v.reading == kEights) {
      run[j] = get_eight<Entry>(v.data, (column + j) * v.step + k, dtype);
      continue;
    }
    if constexpr (kApart) {
      Run apart;
      const int count = end - k < 8 ? static_cast<int>(end - k) : 8;
      one_by_one(apart, v.data, k * v.stride + (column + j) * v.step, v.stride, count, dtype);
      run[j] = apart;
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (k + i < end) run[j].entry[i] = get<Entry>(v.data, (k + i) * v.stride + (column + j) * v.step, dtype);
    }
  }
}

// One tile of x V over one slab of d: 16 rows, 8 * kTiles columns. Warps take 32 columns of x in turn, and their sums
// are added in their order.
template <typename Policy, int kTiles>
__device__ __forceinline__ void shrink(const SharedLora& call, std::int64_t block) {
  constexpr int kCols = 8 * kTiles;
  // where ptxas would rather spill
  constexpr bool kApart = sizeof(typename Policy::Entry) == 2;
  struct Sums {
    alignas(16) float of[kWarps][kRows][kCols + kSpare];
  };
  const std::int64_t high = (call.rows + kRows - 1) / kRows, wide = (call.rank_in + kCols - 1) / kCols;
  const std::int64_t slab = block / (high * wide);
  const std::int64_t top = block / wide % high * kRows, side = block % wide * kCols;
  const std::int64_t begin = slab * call.slab;
  const std::int64_t end = begin + call.slab < call.inputs ? begin + call.slab : call.inputs;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;

  float sum[kTiles][4] = {};
#pragma unroll 1
  for (std::int64_t k = begin + 32 * warp; k < end; k += 32 * kWarps) {
    typename Policy::Run x[2], v[kTiles];
#pragma unroll
    for (int i = 0; i < 2; ++i) x[i] = run_of_x<kApart, typename Policy::Run>(call, top + i * 8 + g, k + 8 * t, end);
    runs_of_v<kApart>(call, side + kTiles * g, k + 8 * t, end, v);
    Policy::multiply(sum, x, v);
  }

  auto& sums = shared<Sums>().of;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[warp][e / 2 * 8 + g][kTiles * (2 * t + e % 2) + j] = sum[j][e];
  __syncthreads();
  for (int unit = threadIdx.x; unit < kRows * kCols; unit += kThreads) {
    const int r = unit / kCols, c = unit % kCols;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sums[w][r][c];
    if (top + r < call.rows && side + c < call.rank_in)
      call.z[(slab * call.rows + top + r) * call.rank_in + side + c] = total;
  }
}

// The products of one row of x with the private right ends of its tasks, one to a warp at a time.
__device__ __forceinline__ void meet(const SharedLora& call, std::int64_t row) {
  const int lane = threadIdx.x % 32;
  const std::int64_t most = private_right(call);
  const Row x = lines_of(call.x, 0, false)(row);
  for (std::int64_t slot = threadIdx.x / 32; slot < call.mixture * most; slot += kThreads / 32) {
    const std::int64_t* task = task_of(call, call.tasks[row * call.mixture + slot / most]);
    const std::int64_t which = slot % most;
    if (!task || which >= task[kSp] + task[kPp]) continue;
    const std::int64_t start = (task[kRightPrivate] + which) * call.inputs;
    float sum = 0;
    if (call.x.reading == kEights && call.dtype != kDouble) {
      for (std::int64_t j = lane * 8; j < call.inputs; j += 256) {
        const Eight<float> a = get_eight<float>(x.data, j, Dtype(x.dtype));
        const Eight<float> b = get_eight<float>(call.right_private, start + j, Dtype(call.dtype));
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fused(a.entry[i], b.entry[i], sum);
      }
    } else {
      for (std::int64_t j = lane; j < call.inputs; j += 32)
        sum = fused(get<float>(x.data, j * x.stride, Dtype(x.dtype)),
                    get<float>(call.right_private, start + j, Dtype(call.dtype)), sum);
    }
    sum = sum_over_warp(sum);
    if (lane == 0) call.meeting[row * call.mixture * most + slot] = sum;
  }
}

// Grid: (tiles of z) x (slabs), then the rows if there are private right ends.
template <typename Policy, int kTiles>
__global__ __launch_bounds__(kThreads, 2) void shrink_kernel(const __grid_constant__ SharedLora call,
                                                             std::int64_t tiles) {
  let_next_begin();
  if (blockIdx.x < tiles)
    shrink<Policy, kTiles>(call, blockIdx.x);
  else
    meet(call, blockIdx.x - tiles);
}

// The same for many rows, of which x and V are of one half precision and lie in runs of 16 bytes.
template <bool kBrain>
__global__ __launch_bounds__(kThreads, 2) void shrink_many_kernel(const __grid_constant__ SharedLora call,
                                                                  std::int64_t tiles) {
  let_next_begin();
  if (blockIdx.x < tiles)
    shrink_many<kBrain>(call, blockIdx.x);
  else
    meet(call, blockIdx.x - tiles);
}

}  // namespace loraspan
