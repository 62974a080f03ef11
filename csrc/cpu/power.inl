// power: per chunk of columns, t = X^T Q, then X t while the chunk may still be in cache. Slabs of columns have their
// own float64 sums, added in order.
namespace loraspan {
namespace LORASPAN_ISA {

inline std::int64_t power_slab_width(const PowerJob& job) { return slab_columns(job.x.columns, kSlabColumns, 32); }

// The sums of a slab: written, or added to what is there.
template <typename T>
inline void power_slab(const PowerJob& job, const Image& s, const T* weights, std::int64_t slab, bool fresh,
                       double* sums) {
  T* basis = scratch<T>(Use::factors, s.width / kLanes<T> * kBasisStride<T>);
  const std::int64_t width = power_slab_width(job), end = min_of(job.x.columns, (slab + 1) * width);
  for (std::int64_t c = slab * width, first = c; c == first || c < end; c += kImageColumns) {
    const std::int64_t n = min_of(kImageColumns, end - c);
    make_basis(s, weights, c, n, basis);
    add_products(Products<T>{job.x, c, c + n, basis, kBasisStride<T>, s.width}, fresh && c == first, sums);
  }
}

// Adds the sums of all slabs and writes a share of the rows.
inline void finish_power(const PowerJob& job, const SlabSums& sums, std::int64_t part, std::int64_t parts) {
  const Image s = image_of(job.x, job.q, job.width);
  add_slabs(sums, s.width, s.k, s.rows * part / parts, s.rows * (part + 1) / parts, job.y);
}

template <typename T>
inline void power_all(const PowerJob* jobs, std::int64_t count, int threads) {
  run_slabs(
      count, threads,
      [&](std::int64_t i) {
        return plan_slabs(jobs[i].x.columns, power_slab_width(jobs[i]), kImageColumns,
                          image_of(jobs[i].x, jobs[i].q, jobs[i].width).product_entries());
      },
      [&](std::int64_t i, const SlabRun& run) {
        const Image s = image_of(jobs[i].x, jobs[i].q, jobs[i].width);
        const T* weights = pack_weights<T>(s);
        for (std::int64_t slab = run.first; slab < run.last; ++slab)
          power_slab<T>(jobs[i], s, weights, slab, run.begins(slab), run.sums_of(slab));
      },
      [&](std::int64_t i, const SlabSums& sums, std::int64_t part, std::int64_t parts) {
        finish_power(jobs[i], sums, part, parts);
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
