// Small dense float64 matrices, many at once: eigenvectors, singular vectors, roots of Grams. A matrix is worked on by
// one thread, so the number of threads and the rest of the batch change no bit.
#pragma once

#include <cstdint>

namespace loraspan {

// `count` matrices [n, n] one after another. values [count, n], descending; vectors [count, n, n], one a column.
struct EighJob {
  const double* a;  // the lower triangle is read
  std::int64_t count, n;
  double* values;
  double* vectors;
};

// `count` matrices [m, n], m >= n. u [count, m, n], s [count, n], descending, v [count, n, n].
struct SvdJob {
  const double* a;
  std::int64_t count, m, n;
  double* u;
  double* s;
  double* v;
};

// `count` positive semidefinite matrices [n, n]: r^T r = gram, and the pseudo-inverse of r; both [count, n, n].
struct RootJob {
  const double* gram;
  std::int64_t count, n;
  double* r;
  double* inverse;
};

// Where the iteration does not end, as for entries that are not finite, all results of the matrix are NaN.
using EighFn = void(const EighJob& job, int threads);
using SvdFn = void(const SvdJob& job, int threads);
using RootFn = void(const RootJob& job, int threads);

}  // namespace loraspan
