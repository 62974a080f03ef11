// Rows wherever they lie, and their way into shared memory.
#pragma once

#include "entries.cuh"

namespace loraspan {

constexpr int kThreads = 256;

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

// Fills `tile` with rows [first, first + kRows) and columns [column, column + kDepth); zeros at and past row `rows` and
// column `end`.
template <typename Entry, int kRows, int kDepth, typename Source>
__device__ void stage(Tile<Entry, kRows, kDepth>& tile, const Source& source, std::int64_t first, std::int64_t rows,
                      std::int64_t column, std::int64_t end, Reading reading) {
  // 32 bits, for they are counted within the tile
  const int high = rows - first < kRows ? static_cast<int>(rows - first) : kRows;
  const int wide = end - column < kDepth ? static_cast<int>(end - column) : kDepth;
  if (reading == kEights) {
#pragma unroll
    for (int unit = threadIdx.x; unit < kRows * kDepth / 8; unit += kThreads) {
      const int r = unit / (kDepth / 8), c = unit % (kDepth / 8) * 8;
      Eight<Entry> got{};
      if (r < high && c < wide) {
        const Row row = source(first + r);
        got = get_eight<Entry>(row.data, column + c, Dtype(row.dtype));
      }
      Quad* to = reinterpret_cast<Quad*>(&tile.entry[r][c]);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(Entry)) / 2; ++i) to[i] = got.quad[i];
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

}  // namespace loraspan
