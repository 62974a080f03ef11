namespace loraspan {
namespace LORASPAN_ISA {

void gram(const GramJob* jobs, std::int64_t count, Precision, int threads) {
  parallel_for(count, threads, [&](std::int64_t index) {
    const GramJob& job = jobs[index];
    const std::int64_t rows = row_count(job.x);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t j = 0; j < rows; ++j) {
        double sum = 0;
        for (std::int64_t c = 0; c < job.x.columns; ++c) sum += entry(job.x, i, c) * entry(job.x, j, c);
        job.out[i * rows + j] = sum;
      }
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
