// What lies between the passes over the factors, in one call each: float64, of rows that are few enough for the cache.
// The number of threads changes no bit.
#pragma once

#include <cstdint>

namespace loraspan {

// Y <- Z R^-1 with R^T R = Y^T Z, for Y and Z [m, n]; Z is M Y for a positive semidefinite M. Only where the columns
// that Y R^-1 would have are far enough from dependent: (2^-53 + the largest asymmetry of Y^T Z) times the square of
// the largest entry of R^-1, both for unit columns, is at most `limit`. Otherwise false, and Y is as it was.
struct WhitenJob {
  double* y;
  const double* z;
  std::int64_t m, n;
  double limit;
};

// out = sum over t of P_t^T S_t S_t^T P_t, S_t = F_t G, for `count` matrices P_t [r, l] and F_t [r, d] one after the
// other, and G [d, k]. out is [l, l], symmetric. Sums over rows are of kProductTerms at a time, and then of those.
struct JointGramJob {
  const double* near;
  const double* far;
  const double* g;
  double* out;
  std::int64_t count, r, l, d, k;
};

using WhitenFn = bool(const WhitenJob& job, int threads);
using JointGramFn = void(const JointGramJob& job, int threads);

}  // namespace loraspan
