// whiten: two tall products with a root between them. Whether rounding allows it is told by what it has done already.
namespace loraspan {
namespace LORASPAN_ISA {

// The largest |G_ij - G_ji| for unit columns, and (G + G^T) / 2 in place.
inline double make_symmetric(double* gram, std::int64_t n, const double* sizes) {
  double largest = 0;
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < i; ++j) {
      const double below = gram[i * n + j], above = gram[j * n + i], apart = (below - above) / sizes[i] / sizes[j];
      largest = larger(largest, apart < 0 ? -apart : apart);
      gram[i * n + j] = gram[j * n + i] = (below + above) / 2;
    }
  return largest;
}

bool whiten(const WhitenJob& job, int threads) {
  const std::int64_t n = job.n;
  if (n == 0) return true;
  // the products and the root have names of their own for what they keep
  double* gram = scratch<double>(Use::sums, 3 * n * n + n);
  double *r = gram + n * n, *inverse = r + n * n, *sizes = inverse + n * n;
  product({job.y, 0, 1, n, job.z, 0, n, gram, 1, n, job.m, n}, threads);
  for (std::int64_t i = 0; i < n; ++i) {
    // neither a column of zeros nor one with a NaN is made a unit one
    if (!(gram[i * n + i] > 0)) return false;
    sizes[i] = __builtin_sqrt(gram[i * n + i]);
  }
  const double noise = kRoundoff + make_symmetric(gram, n, sizes);
  root_one(gram, n, r, inverse);
  // of a Gram with an infinity or a NaN all entries are NaN, and then so is this
  double largest = 0;
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      const double entry = sizes[i] * inverse[i * n + j];
      largest = larger(largest, entry < 0 ? -entry : entry);
    }
  if (!(noise * largest * largest <= job.limit)) return false;
  product({job.z, 0, n, 1, inverse, 0, n, job.y, 1, job.m, n, n}, threads);
  return true;
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
