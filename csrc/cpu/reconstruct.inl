namespace loraspan {
namespace LORASPAN_ISA {

void reconstruct(const ReconstructJob* jobs, std::int64_t count, int threads) {
  parallel_for(count, threads, [&](std::int64_t index) {
    const ReconstructJob& job = jobs[index];
    const auto at = [](const Matrix& a, std::int64_t i, std::int64_t j) {
      return load_entry(a.data, i * a.row_stride + j * a.col_stride, a.dtype);
    };
    for (std::int64_t i = 0; i < job.m; ++i)
      for (std::int64_t j = 0; j < job.p; ++j) {
        double sum = 0;
        if (job.loadings.data)
          for (std::int64_t r = 0; r < job.k; ++r) sum += at(job.basis, i, r) * at(job.loadings, r, j);
        else
          sum = at(job.basis, i, j);
        store_entry(job.out.data, i * job.out.row_stride + j * job.out.col_stride, job.out.dtype, job.scale * sum);
      }
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
