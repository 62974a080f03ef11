// What every operator is given: matrices as lists of row blocks, in whatever memory and dtype they already are.
//
// Nothing here knows Python, torch or pybind11. Callers keep the memory alive for the call.
#pragma once

#include <cstdint>

namespace loraspan {

// The last three are the codes of packed rows (packed.hpp), which only some operators read.
enum class Dtype : std::int64_t { f16 = 0, bf16 = 1, f32 = 2, f64 = 3, packed8 = 4, packed4 = 5, packed16 = 6 };

// The precision sums are kept in: f32 keeps float32 sums over at most 128 columns and adds those in float64; f64
// widens every entry first and keeps float64 throughout. avx512bf16 sums products of bf16 entries with an instruction
// that takes float32 sums below 2^-126 for zero, so f32 may miss 2^-126 for each product there.
enum class Precision : std::int64_t { f32 = 0, f64 = 1 };

// rows x columns entries at data + i * row_stride + j * col_stride; strides in entries, any value, either may be 1.
struct Block {
  const void* data;
  std::int64_t rows;
  std::int64_t row_stride;
  std::int64_t col_stride;
  Dtype dtype;
};

// X [R, columns]: the blocks under each other, R the sum of their rows. Blocks may differ in dtype and strides.
struct Rows {
  const Block* blocks;
  std::int64_t count;
  std::int64_t columns;
};

}  // namespace loraspan
