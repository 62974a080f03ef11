// sketch: Y = X Omega for an Omega of random signs that is never stored; power: Y = X (X^T Q), fused over the columns.
#pragma once

#include "loraspan/types.hpp"

namespace loraspan {

// Omega (j, c) is +1 or -1: bit (c % 128) of the Philox4x32-10 block with counter (j low, j high, c / 128, 0) and key
// (seed low, seed high); bit b of a block is bit (b % 32) of its word b / 32; a set bit is -1. So it depends on the
// seed, the column j of X and the column c of Omega, and on nothing else.
struct SketchJob {
  Rows x;
  std::int64_t width;
  std::uint64_t seed;
  double* y;  // [R, width] row-major, overwritten
};

struct PowerJob {
  Rows x;
  const double* q;  // [R, width] row-major
  std::int64_t width;
  double* y;  // [R, width] row-major, overwritten
};

using SketchFn = void(const SketchJob* jobs, std::int64_t count, Precision precision, int threads);
using PowerFn = void(const PowerJob* jobs, std::int64_t count, Precision precision, int threads);

}  // namespace loraspan
