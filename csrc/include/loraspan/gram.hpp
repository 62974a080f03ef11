// gram: G = X X^T in float64, for a batch of matrices given as row blocks.
#pragma once

#include "loraspan/types.hpp"

namespace loraspan {

struct GramJob {
  Rows x;
  double* out;  // [R, R] row-major, both triangles; overwritten, never read
};

// The sums run over fixed slabs of columns, added in float64 in order: the number of threads and the other jobs of the
// batch change no bit.
using GramFn = void(const GramJob* jobs, std::int64_t count, Precision precision, int threads);

}  // namespace loraspan
