namespace loraspan {
namespace LORASPAN_ISA {

inline void philox(std::uint32_t counter[4], std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53u} * counter[0], b = std::uint64_t{0xCD9E8D57u} * counter[2];
    const std::uint32_t next[4] = {static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key0,
                                   static_cast<std::uint32_t>(b),
                                   static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key1,
                                   static_cast<std::uint32_t>(a)};
    for (int i = 0; i < 4; ++i) counter[i] = next[i];
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

inline double sign_at(std::uint64_t seed, std::int64_t j, std::int64_t c) {
  std::uint32_t counter[4] = {static_cast<std::uint32_t>(j), static_cast<std::uint32_t>(j >> 32),
                              static_cast<std::uint32_t>(c / 128), 0u};
  philox(counter, static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32));
  const std::int64_t bit = c % 128;
  return (counter[bit / 32] >> (bit % 32)) & 1u ? -1.0 : 1.0;
}

void sketch(const SketchJob* jobs, std::int64_t count, Precision, int threads) {
  parallel_for(count, threads, [&](std::int64_t index) {
    const SketchJob& job = jobs[index];
    const std::int64_t rows = row_count(job.x);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t c = 0; c < job.width; ++c) {
        double sum = 0;
        for (std::int64_t j = 0; j < job.x.columns; ++j) sum += entry(job.x, i, j) * sign_at(job.seed, j, c);
        job.y[i * job.width + c] = sum;
      }
  });
}

void power(const PowerJob* jobs, std::int64_t count, Precision, int threads) {
  parallel_for(count, threads, [&](std::int64_t index) {
    const PowerJob& job = jobs[index];
    const std::int64_t rows = row_count(job.x);
    for (std::int64_t i = 0; i < rows * job.width; ++i) job.y[i] = 0;
    for (std::int64_t j = 0; j < job.x.columns; ++j)
      for (std::int64_t c = 0; c < job.width; ++c) {
        double sum = 0;
        for (std::int64_t i = 0; i < rows; ++i) sum += entry(job.x, i, j) * job.q[i * job.width + c];
        for (std::int64_t i = 0; i < rows; ++i) job.y[i * job.width + c] += entry(job.x, i, j) * sum;
      }
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
