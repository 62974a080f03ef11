// Rows wherever they lie, and their way into shared memory.
#pragma once

#include "entries.cuh"

namespace loraspan {

constexpr int kThreads = 256;

// The last job that begins at or before `block`.
template <typename Job>
__device__ __forceinline__ const Job& job_of(const Job* jobs, std::int64_t count, std::int64_t Job::* first,
                                             std::int64_t block) {
  std::int64_t low = 0, high = count;
  while (high - low > 1) {
    const std::int64_t middle = (low + high) / 2;
    (jobs[middle].*first <= block ? low : high) = middle;
  }
  return jobs[low];
}

// One row of a matrix; entry j is at data + j * stride, counted in entries. Tables of these are made by the caller.
struct Row {
  const void* data;
  std::int64_t stride;
  std::int64_t dtype;
};

// How a block's threads share out a tile of rows. It changes no value.
enum Reading : std::int64_t {
  kAlongColumns = 0,  // neighbouring threads take neighbouring columns
  kAlongRows = 1,     // neighbouring threads take neighbouring rows: columns lie together in memory
  kEights = 2,        // a thread takes 8 columns by loads of 16 bytes: all rows aligned to 16 bytes, column stride 1,
                      // the number of columns a multiple of 8
  kEightsAcross = 3,  // a thread takes one column of 8 rows, which lie beside each other and aligned to 16 bytes
};

// Rows by a table.
struct TableOfRows {
  const Row* rows;

  __device__ __forceinline__ Row operator()(std::int64_t i) const { return rows[i]; }
};

// Rows of one matrix, `step` bytes apart.
struct EvenRows {
  const void* data;
  std::int64_t step;
  std::int64_t stride;
  std::int64_t dtype;

  __device__ __forceinline__ Row operator()(std::int64_t i) const {
    return {static_cast<const char*>(data) + i * step, stride, dtype};
  }
};

// A matrix, or the members of a batch of them `apart` entries from each other. All strides are counted in entries.
struct Matrix {
  void* data;
  std::int64_t apart, stride, step, dtype, reading;
};

// Rows of `matrix`, or its columns.
__device__ __forceinline__ EvenRows lines_of(const Matrix& matrix, std::int64_t member, bool columns) {
  const std::int64_t size = matrix.dtype == kDouble ? 8 : matrix.dtype == kFloat ? 4 : 2;
  return {static_cast<const char*>(matrix.data) + member * matrix.apart * size,
          (columns ? matrix.step : matrix.stride) * size, columns ? matrix.stride : matrix.step, matrix.dtype};
}

// A tile in shared memory. The 16 bytes between rows keep rows 0 to 7 out of each other's banks, at any depth that is
// a multiple of 32 words.
template <typename Entry, int kRows, int kDepth>
struct Tile {
  static constexpr int kStride = kDepth + 16 / static_cast<int>(sizeof(Entry));
  alignas(16) Entry entry[kRows][kStride];
};

// Fills `tile`, whole only after wait_for_copies and a barrier, with rows [first, first + kRows) and columns [column,
// column + kDepth); zeros at and past row `rows` and column `end`.
template <typename Entry, int kRows, int kDepth, typename Source>
__device__ void stage(Tile<Entry, kRows, kDepth>& tile, const Source& source, std::int64_t first, std::int64_t rows,
                      std::int64_t column, std::int64_t end, Reading reading) {
  // 32 bits, for they are counted within the tile
  const int high = rows - first < kRows ? static_cast<int>(rows - first) : kRows;
  const int wide = end - column < kDepth ? static_cast<int>(end - column) : kDepth;
  if (reading == kEights) {
    constexpr int kQuads = static_cast<int>(sizeof(Entry)) / 2;
#pragma unroll
    for (int unit = threadIdx.x; unit < kRows * kDepth / 8; unit += kThreads) {
      const int r = unit / (kDepth / 8), c = unit % (kDepth / 8) * 8;
      Quad* to = reinterpret_cast<Quad*>(&tile.entry[r][c]);
      Eight<Entry> got{};
      if (r < high && c < wide) {
        const Row row = source(first + r);
        if (as_it_is<Entry>(row.dtype)) {
          const Entry* from = static_cast<const Entry*>(row.data) + column + c;
#pragma unroll
          for (int i = 0; i < kQuads; ++i) copy_aside(to + i, reinterpret_cast<const Quad*>(from) + i);
          continue;
        }
        got = get_eight<Entry>(row.data, column + c, Dtype(row.dtype));
      }
#pragma unroll
      for (int i = 0; i < kQuads; ++i) to[i] = got.quad[i];
    }
    return;
  }
  if (reading == kEightsAcross) {
#pragma unroll
    for (int unit = threadIdx.x; unit < kRows * kDepth / 8; unit += kThreads) {
      // two threads take 32 bytes of one column, which is what memory gives at least; the next two the next column
      const int c = unit / 2 % kDepth, r = (unit / (2 * kDepth) * 2 + unit % 2) * 8;
      Eight<Entry> got{};
      if (r < high && c < wide) {
        const Row row = source(first + r);
        got = get_eight<Entry>(row.data, (column + c) * row.stride, Dtype(row.dtype));
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) tile.entry[r + i][c] = got.entry[i];
    }
    return;
  }
#pragma unroll 2
  for (int i = threadIdx.x; i < kRows * kDepth; i += kThreads) {
    const int r = reading == kAlongRows ? i % kRows : i / kDepth;
    const int c = reading == kAlongRows ? i / kRows : i % kDepth;
    Entry got{};
    if (r < high && c < wide) {
      const Row row = source(first + r);
      got = get<Entry>(row.data, (column + c) * row.stride, Dtype(row.dtype));
    }
    tile.entry[r][c] = got;
  }
}

// The same for rows that are all read by kEights and are of the tile's entries: nothing goes through registers.
template <typename Entry, int kRows, int kDepth, typename Source>
__device__ __forceinline__ void stage_aside(Tile<Entry, kRows, kDepth>& tile, const Source& source, std::int64_t first,
                                            std::int64_t rows, std::int64_t column, std::int64_t end) {
  const int high = rows - first < kRows ? static_cast<int>(rows - first) : kRows;
  const int wide = end - column < kDepth ? static_cast<int>(end - column) : kDepth;
  constexpr int kEntries = 16 / static_cast<int>(sizeof(Entry)), kAcross = kDepth / kEntries;
#pragma unroll 1
  for (int unit = threadIdx.x; unit < kRows * kAcross; unit += kThreads) {
    const int r = unit / kAcross, c = unit % kAcross * kEntries;
    Quad* to = reinterpret_cast<Quad*>(&tile.entry[r][c]);
    if (r < high && c < wide)
      copy_aside(to, static_cast<const Entry*>(source(first + r).data) + column + c);
    else
      *to = Quad{};
  }
}

// Both sides of one step, several times over: some are filled while one is multiplied.
template <typename Left, typename Right, int kStages = 2>
struct Pairs {
  struct Pair {
    Left left;
    Right right;
  } pair[kStages];
};

// Steps of kDepth over [begin, end): fill(pair, k) stages both sides, use(pair, k) multiplies them. One barrier a step:
// it shows all threads the pair to come, and that none is still in the pair to be filled.
template <int kDepth, typename Left, typename Right, int kStages, typename Fill, typename Use>
__device__ __forceinline__ void step_through(Pairs<Left, Right, kStages>& pairs, std::int64_t begin, std::int64_t end,
                                             const Fill& fill, const Use& use) {
  constexpr int kAhead = kStages - 1;
#pragma unroll
  for (int stage = 0; stage < kAhead; ++stage) {
    if (begin + stage * kDepth < end) fill(pairs.pair[stage], begin + stage * kDepth);
    end_of_copies();
  }
  int now = 0;
  for (std::int64_t k = begin; k < end; k += kDepth) {
    // of the steps that are on their way, all but the first
    wait_for_copies<kAhead - 1>();
    __syncthreads();
    const int last = now == 0 ? kAhead : now - 1;
    if (k + kAhead * kDepth < end) fill(pairs.pair[last], k + kAhead * kDepth);
    end_of_copies();
    use(pairs.pair[now], k);
    now = now == kAhead ? 0 : now + 1;
  }
}

}  // namespace loraspan
