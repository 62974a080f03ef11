// A batch for combine, in which some jobs may do without X V.
namespace loraspan {
namespace LORASPAN_ISA {

// Jobs whose X V is not asked for go the way of combine_image.inl.
template <typename T>
inline void combine_all(const CombineJob* jobs, std::int64_t count, int threads) {
  run_slabs(
      count, threads,
      [&](std::int64_t i) {
        const CombineJob& job = jobs[i];
        if (!job.xv) return Slabs{slabs_of(job.x.columns, image_shape(job).slab_width), job.k * job.k, 0, nullptr};
        const CombineShape s = combine_shape<T>(job);
        return Slabs{slabs_of(job.x.columns, s.slab_width), s.sums(), 0, nullptr};
      },
      [&](std::int64_t i, std::int64_t slab, double* sums) {
        if (jobs[i].xv)
          combine_slab<T>(jobs[i], slab, sums);
        else
          image_slab<T>(jobs[i], slab, sums);
      },
      [&](std::int64_t i, std::int64_t slabs, const double* sums, std::int64_t part, std::int64_t parts) {
        if (jobs[i].xv)
          finish_combine<T>(jobs[i], slabs, sums, part, parts);
        else
          finish_image(jobs[i], slabs, sums, part, parts);
      });
}

void combine(const CombineJob* jobs, std::int64_t count, Precision precision, int threads) {
  if (precision == Precision::f32)
    combine_all<float>(jobs, count, threads);
  else
    combine_all<double>(jobs, count, threads);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
