// power: per chunk of columns, t = X^T Q, then X t while the chunk may still be in cache. Slabs of columns have their
// own float64 sums, added in order at the end.
namespace loraspan {
namespace LORASPAN_ISA {

inline std::int64_t power_slab_width(const PowerJob& job) { return slab_columns(job.x.columns, kSlabColumns, 32); }

template <typename T>
inline void power_slab(const PowerJob& job, std::int64_t slab, double* sums) {
  const Image s = image_of(job.x, job.q, job.width);
  const T* weights = pack_weights<T>(s);
  T* basis = scratch<T>(Use::factors, s.width / kLanes<T> * kBasisStride<T>);
  for (std::int64_t i = 0; i < s.product_entries(); ++i) sums[i] = 0;
  const std::int64_t width = power_slab_width(job), end = min_of(job.x.columns, (slab + 1) * width);
  for (std::int64_t c = slab * width; c < end; c += kImageColumns) {
    const std::int64_t n = min_of(kImageColumns, end - c);
    make_basis(s, weights, c, n, basis);
    add_products<T>(job.x, 0, s.rows, c, c + n, basis, kBasisStride<T>, sums, s.width);
  }
}

// Adds the slabs in order and writes a share of the rows.
inline void finish_power(const PowerJob& job, std::int64_t slabs, const double* sums, std::int64_t part,
                         std::int64_t parts) {
  const Image s = image_of(job.x, job.q, job.width);
  add_slabs(slabs, sums, s.product_entries(), s.width, s.k, s.rows * part / parts, s.rows * (part + 1) / parts, job.y);
}

template <typename T>
inline void power_all(const PowerJob* jobs, std::int64_t count, int threads) {
  run_slabs(
      count, threads,
      [&](std::int64_t i) {
        return Slabs{slabs_of(jobs[i].x.columns, power_slab_width(jobs[i])),
                     image_of(jobs[i].x, jobs[i].q, jobs[i].width).product_entries(), 0, nullptr};
      },
      [&](std::int64_t i, std::int64_t first, std::int64_t last, double* sums) {
        const std::int64_t entries = image_of(jobs[i].x, jobs[i].q, jobs[i].width).product_entries();
        for (std::int64_t slab = first; slab < last; ++slab, sums += entries) power_slab<T>(jobs[i], slab, sums);
      },
      [&](std::int64_t i, std::int64_t slabs, const double* sums, std::int64_t part, std::int64_t parts) {
        finish_power(jobs[i], slabs, sums, part, parts);
      });
}

void power(const PowerJob* jobs, std::int64_t count, Precision precision, int threads) {
  if (precision == Precision::f32)
    power_all<float>(jobs, count, threads);
  else
    power_all<double>(jobs, count, threads);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
