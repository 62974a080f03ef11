// product: C_t = A_t B_t of float64 matrices, small or tall, many at once.
#pragma once

#include <cstdint>

namespace loraspan {

// Entry (i, p) of A_t at a + t * a_step + i * a_row + p * a_column, (p, j) of B_t at b + t * b_step + p * b_row + j; C
// is [count, m, n], overwritten. Sums are of kProductTerms products at a time, and then of those: neither the threads
// nor the rest of the batch change a bit.
struct ProductJob {
  const double* a;
  std::int64_t a_step, a_row, a_column;
  const double* b;
  std::int64_t b_step, b_row;
  double* c;
  std::int64_t count, m, k, n;
};

inline constexpr std::int64_t kProductTerms = 128;

using ProductFn = void(const ProductJob& job, int threads);

}  // namespace loraspan
