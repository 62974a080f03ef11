// short_svd: gram, eigh and combine of a matrix by one thread, one after the other, so that the second pass over it
// finds it in cache and nobody waits in between. Matrices that are fewer than that keeps busy go through all three
// together.
namespace loraspan {
namespace LORASPAN_ISA {

// Columns of `vectors` [n, n] to w [n, k], their signs settled.
inline void take_vectors(const double* vectors, std::int64_t n, std::int64_t k, double* w) {
  for (std::int64_t j = 0; j < k; ++j) {
    double largest = 0;
    for (std::int64_t i = 0; i < n; ++i) {
      const double x = vectors[i * n + j];
      if ((x < 0 ? -x : x) > (largest < 0 ? -largest : largest)) largest = x;
    }
    for (std::int64_t i = 0; i < n; ++i) w[i * k + j] = largest < 0 ? -vectors[i * n + j] : vectors[i * n + j];
  }
}

// Members [first, first + count).
inline void short_svd_some(const ShortSvdJob& job, std::int64_t first, std::int64_t count, int threads) {
  const std::int64_t n = job.x.rows, k = job.k, square = n * n;
  double* grams = scratch<double>(Use::steps, count * (2 * square + n * k));
  double *vectors = grams + count * square, *weights = vectors + count * square;
  Block* blocks = scratch<Block>(Use::blocks, count);
  GramJob* sums = scratch<GramJob>(Use::first_jobs, count);
  CombineJob* images = scratch<CombineJob>(Use::second_jobs, count);
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t member = first + i;
    blocks[i] = job.x;
    blocks[i].data = static_cast<const char*>(job.x.data) + member * job.x_stride;
    const Rows x = {blocks + i, 1, job.columns};
    sums[i] = {x, grams + i * square};
    void* v = static_cast<char*>(job.v) + member * job.v_stride;
    images[i] = {x,       weights + i * n * k,     k, v, job.v_row_stride, job.v_col_stride, job.v_dtype,
                 nullptr, job.vtv + member * k * k};
  }
  gram(sums, count, Precision::f32, threads);
  eigh({grams, count, n, job.values + first * n, vectors}, threads);
  for (std::int64_t i = 0; i < count; ++i) {
    double total = 0;
    for (std::int64_t r = 0; r < n; ++r) total += grams[i * square + r * n + r];
    job.totals[first + i] = total;
    double* w = job.w + (first + i) * n * k;
    const double* values = job.values + (first + i) * n;
    take_vectors(vectors + i * square, n, k, w);
    for (std::int64_t r = 0; r < n; ++r)
      for (std::int64_t j = 0; j < k; ++j)
        weights[(i * n + r) * k + j] = w[r * k + j] / __builtin_sqrt(values[j] > 0 ? values[j] : 0.0);
  }
  combine(images, count, Precision::f32, threads);
}

void short_svd(const ShortSvdJob& job, int threads) {
  if (job.count < 4 * threads) return short_svd_some(job, 0, job.count, threads);
  parallel_for(job.count, threads, [&](std::int64_t i) { short_svd_some(job, i, 1, 1); });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
