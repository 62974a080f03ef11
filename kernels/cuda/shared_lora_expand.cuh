// What both forms of the second launch of shared_lora share, to have the rows of a block prepared and to meet U; and
// the form for many rows.
#pragma once

#include <type_traits>

#include "shared_lora_rows.cuh"

namespace loraspan {

// Asks for the shared ends of the tasks of a row, by 16 lanes.
__device__ __forceinline__ void expect_columns(const SharedLora& call, std::int64_t row) {
  const std::int64_t size = call.dtype == kFloat ? 4 : 2, lane = threadIdx.x % 16;
  for (std::int64_t m = 0; m < call.mixture; ++m) {
    const std::int64_t* task = task_of(call, call.tasks[row * call.mixture + m]);
    if (!task) continue;
    const std::int64_t rights = (task[kDense] ? 0 : task[kSs]) + task[kPs], lefts = task[kSs] + task[kSp];
    const char* right = static_cast<const char*>(call.right) + task[kRight] * call.rank_in * size;
    const char* left = static_cast<const char*>(call.left) + task[kLeft] * call.rank_out * size;
    for (std::int64_t at = 128 * lane; at < rights * call.rank_in * size; at += 128 * 16) expect(right + at);
    for (std::int64_t at = 128 * lane; at < lefts * call.rank_out * size; at += 128 * 16) expect(left + at);
  }
}

// The row of a block at `top` that is its r-th, -1 for none.
__device__ __forceinline__ std::int64_t row_of(const SharedLora& call, std::int64_t top, int r) {
  return r < call.height && top + r < call.rows ? top + r : -1;
}

// Rows that a block at `top` has.
__device__ __forceinline__ int rows_of(const SharedLora& call, std::int64_t top) {
  return static_cast<int>(call.rows - top < call.height ? call.rows - top : call.height);
}

// Prepares all rows of a block, each warp two of 16 at a time, and gives what they want done.
template <typename Known>
__device__ __forceinline__ const int* prepare_rows(const SharedLora& call, const Room& room, std::int64_t top,
                                                   int sixteens) {
  int* wishes = reinterpret_cast<int*>(places_of(room, static_cast<int>(call.height)).z);
  const int first = threadIdx.x / 32 + kWarps * (threadIdx.x % 32 / 16);
#pragma unroll 1
  for (int mine = first; mine < kRows * sixteens; mine += kRows) {
    const std::int64_t row = row_of(call, top, mine);
    if (row < 0) continue;
    expect_columns(call, row);
    if (threadIdx.x % 16 == 0) wishes[mine] = wish_of(call, row);
  }
  wait_for_last();
#pragma unroll 1
  for (int mine = first; mine < kRows * sixteens; mine += kRows) {
    const std::int64_t row = row_of(call, top, mine);
    const Places place = places_of(room, row < 0 ? 0 : mine);
    if (Known::dtype(call.dtype) == kFloat)
      prepare<Known, float>(call, row, place);
    else
      prepare<Known, std::uint16_t>(call, row, place);
  }
  __syncthreads();
  return wishes;
}

// Adds the products of two rows of g, columns [from, from + 32), with 8 columns of kTiles tiles of 8 outputs.
template <typename Policy, int kTiles>
__device__ __forceinline__ void add_products(const float* const (&g)[2], int part_of_g, int from,
                                             const Eight<typename Policy::Entry> (&u)[kTiles],
                                             float (&sum)[kTiles][4]) {
  const int at = from + threadIdx.x % 4 * 8;
  if constexpr (std::is_same_v<Policy, Halves<true>>) {
    Quad part[3][2];
#pragma unroll
    for (int p = 0; p < 3; ++p)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        part[p][i] = *reinterpret_cast<const Quad*>(reinterpret_cast<const std::uint16_t*>(g[i]) + p * part_of_g + at);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        float eight[4] = {};
#pragma unroll
        for (int p = 2; p >= 0; --p) {
          const std::uint32_t left[2] = {part[p][0].word[i], part[p][1].word[i]};
          multiply_16x8x8<true>(eight, left, u[j].quad[0].word[i]);
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[j][e] += eight[e];
      }
  } else {
    Eight<float> left[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int e = 0; e < 8; ++e) left[i].entry[e] = reinterpret_cast<const Four*>(g[i] + at)[e / 4].value[e % 4];
    constexpr bool kExact = sizeof(typename Policy::Entry) == 2;
    Floats<kExact ? 1 : 3>::multiply(sum, left, u, [](auto entry) { return Policy::value(entry); });
  }
}

// Outputs of a warp's turn where rows are many, four tiles of 8; so a lane has 8 of a row, which are 16 bytes.
constexpr int kManyTiles = 4, kManyOutputs = 8 * kManyTiles;

// Grid: (call.height rows, 32 of them) x (call.wide outputs), of a call that is_plain and has no private left ends.
template <typename Policy>
__global__ __launch_bounds__(kThreads, 2) void expand_many_kernel(const __grid_constant__ SharedLora call) {
  using Known = Known<true, Policy::kDtype>;
  using Entry = typename Policy::Entry;
  const std::int64_t across = (call.outputs + call.wide - 1) / call.wide;
  const std::int64_t top = blockIdx.x / across * call.height, begin = blockIdx.x % across * call.wide;
  const auto end = static_cast<int>(call.outputs - begin < call.wide ? call.outputs - begin : call.wide);
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, own = threadIdx.x / 32 * kManyOutputs;
  const int rank = static_cast<int>(call.rank_out), rows = rows_of(call, top);
  // asked for a turn ahead
  const Entry* expected = static_cast<const Entry*>(call.y.data) + (top + lane) * call.y.stride + begin + own;
  if (lane < rows && own < end) expect(expected);
  const Room room = room_of<Known>(call);
  const int* wishes = prepare_rows<Known>(call, room, top, 2);

  // a lane's outputs of U are 8 (g / 2) + 2 j + g % 2 for tile j, and of y 8 t to 8 t + 7
  const int of_u = own + 8 * (g / 2), of_y = own + 8 * t;
  const Entry* u = static_cast<const Entry*>(call.u.data) + (begin + of_u + g % 2) * call.u.stride + 8 * t;
  const float* own_g = places_of(room, g).g;
  Entry* y = static_cast<Entry*>(call.y.data) + (top + g) * call.y.stride + begin + of_y;
  constexpr int kTurn = kWarps * kManyOutputs;
#pragma unroll 1
  for (int first = 0; first < end; first += kTurn) {
    expected += kTurn;
    if (lane < rows && first + kTurn + own < end) expect(expected);
    float sum[2][kManyTiles][4] = {};
#pragma unroll 1
    for (int k = 0; k < rank; k += kDeep) {
      Eight<Entry> held[kManyTiles] = {};
      if (first + of_u < end && k + 8 * t < rank)
#pragma unroll
        for (int j = 0; j < kManyTiles; ++j)
          held[j].quad[0] = *in_global(reinterpret_cast<const Quad*>(u + 2 * j * call.u.stride + k));
      // a row that the block does not have is nobody's, and is not written
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float* lines[2] = {own_g + 16 * h * room.size, own_g + (16 * h + 8) * room.size};
        add_products<Policy>(lines, part_of_g(call), k, held, sum[h]);
      }
    }
    Eight<Entry> out[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (g + 8 * i < rows && first + of_y < end)
        out[i].quad[0] = *in_global(reinterpret_cast<const Quad*>(y + 8 * i * call.y.stride));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (g + 8 * i >= rows || first + of_y >= end || wishes[g + 8 * i] == kLeave) continue;
      const bool spoilt = wishes[g + 8 * i] == kSpoil;
#pragma unroll
      for (int q = 0; q < 8; ++q) {
        const float value = Policy::value(out[i].entry[q]) + sum[i / 2][q / 2][i % 2 * 2 + q % 2];
        out[i].entry[q] = Policy::rounded(spoilt ? bits_to_float(0x7fc00000u) : value);
      }
      *reinterpret_cast<Quad*>(y + 8 * i * call.y.stride) = out[i].quad[0];
    }
    u += kTurn * call.u.stride;
    y += kTurn;
  }
}

}  // namespace loraspan
