// sparse_sketch: Y = X Omega for an Omega with four entries in each row, +1 or -1, that is never stored.
#pragma once

#include "loraspan/types.hpp"

namespace loraspan {

// The columns of Omega are four quarters of m = width / 4, its rows blocks of m, the last one shorter. Row j has one
// entry in each quarter q: column (j + shift) % m of it, where block and quarter have a shift of their own. Word q of
// the Philox4x32-10 block with counter (j low, j high, 0, 1) and key (seed low, seed high) says by its lowest bit
// whether that entry is -1; the 31 others of the first row of a block, times m and divided by 2^31, are the shift.
struct SparseSketchJob {
  Rows x;
  std::int64_t width;  // a multiple of 4, and not 0
  std::uint64_t seed;
  float* y;  // [R, width] row-major, overwritten
};

inline constexpr std::int64_t kQuarters = 4;
// The last word of the counter, which is 0 where dense signs are drawn.
inline constexpr std::uint64_t kSparseStream = 1;

using SparseSketchFn = void(const SparseSketchJob* jobs, std::int64_t count, int threads);

}  // namespace loraspan
