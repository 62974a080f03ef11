// squares: the sum of squares of every row of X, in float64.
#pragma once

#include "loraspan/types.hpp"

namespace loraspan {

struct SquaresJob {
  Rows x;
  double* out;  // [R], overwritten
};

// Every row is summed by one thread in an order that follows from its length and strides alone.
using SquaresFn = void(const SquaresJob* jobs, std::int64_t count, int threads);

}  // namespace loraspan
