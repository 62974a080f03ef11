// reconstruct: out = scale * basis @ loadings, many at once, each written once in its final dtype and place.
#pragma once

#include "loraspan/packed.hpp"

namespace loraspan {

// A matrix in memory, entry (i, j) at data + i * row_stride + j * col_stride (strides in entries); or, where its dtype
// says so, packed rows for its columns: entry (i, j) is entry i of row j of them, and strides mean nothing.
struct Matrix {
  void* data;
  std::int64_t row_stride;
  std::int64_t col_stride;
  Dtype dtype;
  const std::uint16_t* scales = nullptr;  // of packed rows, whose codes are at data
  std::int64_t length = 0;                // of a packed row
};

struct ReconstructJob {
  Matrix basis;  // [m, k], may be packed
  // [k, p], may be packed; null data means the identity (then p == k): private columns are converted, scaled and put in
  // place.
  Matrix loadings;
  Matrix out;  // [m, p]; overwritten, never read; must not overlap the inputs
  std::int64_t m;
  std::int64_t k;
  std::int64_t p;
  double scale;
};

// Sums are kept in float32, or in float64 if basis, loadings or out are float64; one rounding to the dtype of out.
using ReconstructFn = void(const ReconstructJob* jobs, std::int64_t count, int threads);

}  // namespace loraspan
