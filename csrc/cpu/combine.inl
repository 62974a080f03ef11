namespace loraspan {
namespace LORASPAN_ISA {

void combine(const CombineJob* jobs, std::int64_t count, Precision, int threads) {
  parallel_for(count, threads, [&](std::int64_t index) {
    const CombineJob& job = jobs[index];
    const std::int64_t rows = row_count(job.x), k = job.k;
    for (std::int64_t i = 0; i < rows * k; ++i) job.xv[i] = 0;
    for (std::int64_t i = 0; i < k * k; ++i) job.vtv[i] = 0;
    for (std::int64_t j = 0; j < job.x.columns; ++j) {
      for (std::int64_t c = 0; c < k; ++c) {
        double sum = 0;
        for (std::int64_t i = 0; i < rows; ++i) sum += entry(job.x, i, j) * job.w[i * k + c];
        const std::int64_t at = j * job.v_row_stride + c * job.v_col_stride;
        store_entry(job.v, at, job.v_dtype, sum);
        const double v = load_entry(job.v, at, job.v_dtype);
        for (std::int64_t i = 0; i < rows; ++i) job.xv[i * k + c] += entry(job.x, i, j) * v;
        for (std::int64_t other = 0; other <= c; ++other) {
          const double w = load_entry(job.v, j * job.v_row_stride + other * job.v_col_stride, job.v_dtype);
          job.vtv[c * k + other] += v * w;
          if (other != c) job.vtv[other * k + c] += v * w;
        }
      }
    }
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
