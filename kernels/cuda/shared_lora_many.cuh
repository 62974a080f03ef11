// The first launch of shared_lora where rows are many: x V by blocks that stage both for all of their warps.
#pragma once

#include "shared_lora.cuh"

namespace loraspan {

// 64 columns of 64 rows of x, by runs of 8 entries, and as many rows of 64 columns of V. Runs are moved about so that
// those which a warp reads at once lie in different banks: run c of row r of x is at c ^ 4 (r % 2), of row k of V at
// c ^ turn_of(k).
struct Stage {
  static constexpr int kHigh = 64, kDeep = 64, kWide = 64, kRuns = 8;
  Quad x[kHigh][kRuns], v[kDeep][kRuns];

  __device__ __forceinline__ static int turn_of(int k) { return k / 8 % 4 * 2 + k % 2; }
};
constexpr int kStages = 3, kChunk = 32;
struct Stages {
  Stage of[kStages];
};
static_assert(sizeof(Stages) <= 48 * 1024, "a block has so much on every card");

// Chunks of x's columns in the order in which sums are made: those that one warp takes of a slab where rows are few
// (shared_lora_shrink.cuh) follow each other.
struct Chunks {
  std::int64_t k;
  int turns, turn, warp;

  __device__ __forceinline__ Chunks(const SharedLora& call, std::int64_t slab)
      : k(slab * call.slab), turns(static_cast<int>(call.slab / (kChunk * kWarps))), turn(0), warp(0) {}

  __device__ __forceinline__ std::int64_t next() {
    const std::int64_t now = k;
    k += kChunk;
    if (turns > 1) {
      turn = turn + 1 == turns ? 0 : turn + 1;
      // the next turn, the first of the next warp, or the next slab
      if (turn)
        k += kChunk * (kWarps - 1);
      else if ((warp = (warp + 1) % kWarps))
        k -= static_cast<std::int64_t>(turns - 1) * (kChunk * kWarps);
    }
    return now;
  }
};

// What a thread stages of x and V: a run of each of two rows.
struct Runs {
  const std::uint16_t *x, *v;
  Quad *to_x, *to_v;
  int c, line, rows, columns;

  __device__ __forceinline__ Runs(const SharedLora& call, Stage& stage, std::int64_t top, std::int64_t side)
      : c(threadIdx.x % Stage::kRuns), line(threadIdx.x / Stage::kRuns) {
    rows = static_cast<int>(call.rows - top < Stage::kHigh ? call.rows - top : Stage::kHigh);
    columns = static_cast<int>(call.rank_in - side < Stage::kWide ? call.rank_in - side : Stage::kWide);
    x = static_cast<const std::uint16_t*>(call.x.data) + (top + line) * call.x.stride + c % 4 * 8;
    v = static_cast<const std::uint16_t*>(call.v.data) + line * call.v.stride + side + 8 * c;
    to_x = &stage.x[line][c ^ (line % 2 * 4)];
    to_v = &stage.v[line][c ^ Stage::turn_of(line)];
  }

  // Fills stage `stage` with two chunks; zeros beside x and V.
  __device__ __forceinline__ void fill(const SharedLora& call, int stage, std::int64_t one, std::int64_t two) const {
    constexpr int kApart = kThreads / Stage::kRuns;
    const std::int64_t k = c < 4 ? one : two;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Quad* to = to_x + stage * static_cast<int>(sizeof(Stage) / sizeof(Quad)) + i * kApart * Stage::kRuns;
      if (line + i * kApart < rows && k + c % 4 * 8 < call.inputs)
        copy_aside(to, x + i * kApart * call.x.stride + k);
      else
        *to = Quad{};
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int64_t row = i ? two : one;
      Quad* to = to_v + stage * static_cast<int>(sizeof(Stage) / sizeof(Quad)) + i * kApart * Stage::kRuns;
      if (8 * c < columns && row + line < call.inputs)
        copy_aside(to, v + row * call.v.stride);
      else
        *to = Quad{};
    }
  }
};
static_assert(kThreads / Stage::kRuns == kChunk, "a thread's two rows of V are of one chunk each");

// One tile of x V, 64 rows by 64 columns, over slabs [first, first + call.each): each slab's sums to its own place, or
// the sum of all of them where the block has them all. Four warps by two, each 16 rows by 32 columns.
template <bool kBrain>
__device__ __forceinline__ void shrink_many(const SharedLora& call, std::int64_t block) {
  const std::int64_t high = (call.rows + Stage::kHigh - 1) / Stage::kHigh,
                     wide = (call.rank_in + Stage::kWide - 1) / Stage::kWide;
  const std::int64_t top = block / wide % high * Stage::kHigh, side = block % wide * Stage::kWide;
  const std::int64_t first = block / (high * wide) * call.each;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row = warp % 4 * 16 + g, column = warp / 4 * 32;
  const bool in_one = call.slabs == 1;

  auto& stages = shared<Stages>().of;
  const Runs runs(call, stages[0], top, side);
  Chunks chunks(call, first);
  const int steps = static_cast<int>(call.slab / Stage::kDeep), last = static_cast<int>(call.each) * steps;
  // where the steps of a warp's turns end, and those of a slab
  int left_of_warp = chunks.turns, left_of_slab = steps, filled = 0, to = 0, from = 0;
  const auto fill = [&] {
    if (filled < last) {
      const std::int64_t one = chunks.next();
      runs.fill(call, to, one, chunks.next());
    }
    ++filled;
    to = to + 1 == kStages ? 0 : to + 1;
    end_of_copies();
  };
  // of a chunk's turns, of a slab, of all slabs
  float sum[4][4] = {}, slab[4][4] = {}, all[4][4] = {};
  for (int step = 0; step < kStages - 1; ++step) fill();
#pragma unroll 1
  for (int step = 0; step < last; ++step) {
    wait_for_copies<kStages - 2>();
    __syncthreads();
    fill();
    const Stage& stage = stages[from];
    from = from + 1 == kStages ? 0 : from + 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Quad x[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) x[i] = stage.x[row + 8 * i][(4 * half + t) ^ (row % 2 * 4)];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // lane l gives where row l % 8 of tile l / 8 lies: of 32 columns those that lanes t have at word i
        const int line = kChunk * half + lane % 8 / 2 * 8 + 2 * i + lane % 2;
        std::uint32_t right[4];
        load_across(right, &stage.v[line][(column / 8 + lane / 8) ^ Stage::turn_of(line)]);
        const std::uint32_t left[2] = {x[0].word[i], x[1].word[i]};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float part[4] = {};
          multiply_16x8x8<kBrain>(part, left, right[j]);
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[j][e] += part[e];
        }
      }
      if (--left_of_warp) continue;
      left_of_warp = chunks.turns;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          slab[j][e] += sum[j][e];
          sum[j][e] = 0;
        }
    }
    if (--left_of_slab) continue;
    left_of_slab = steps;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        all[j][e] = in_one ? all[j][e] + slab[j][e] : slab[j][e];
        slab[j][e] = 0;
      }
    if (in_one && step + 1 < last) continue;
    float* z = call.z + (in_one ? 0 : first + step / steps) * call.rows * call.rank_in;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int r = row + e / 2 * 8, c = column + 8 * j + 2 * t + e % 2;
        if (r < runs.rows && c < runs.columns) z[(top + r) * call.rank_in + side + c] = all[j][e];
      }
  }
}

}  // namespace loraspan
