// joint_gram: some tasks at a time, whose small products stay in cache, and one product for the sum over their rows.
namespace loraspan {
namespace LORASPAN_ISA {

// Sums of so many groups of tasks are kept apart, or fewer.
constexpr std::int64_t kJointGroups = 64;

// Tasks [first, end) in `out`.
inline void joint_group(const JointGramJob& job, std::int64_t first, std::int64_t end, double* out) {
  const std::int64_t r = job.r, l = job.l, k = job.k, rows = (end - first) * r;
  const double *near = job.near + first * r * l, *far = job.far + first * r * job.d;
  double* seen = scratch<double>(Use::factors, rows * k);
  double* turned = scratch<double>(Use::columns, k * r + r * r);
  double* square = turned + k * r;
  double* middle = scratch<double>(Use::rows, rows * l);
  product_piece({far, 0, job.d, 1, job.g, 0, k, seen, 1, rows, job.d, k}, 0, 0, rows);
  for (std::int64_t t = 0; t < end - first; ++t) {
    const double* s = seen + t * r * k;
    for (std::int64_t i = 0; i < r; ++i)
      for (std::int64_t p = 0; p < k; ++p) turned[p * r + i] = s[i * k + p];
    product_piece({s, 0, k, 1, turned, 0, r, square, 1, r, k, r}, 0, 0, r);
    product_piece({square, 0, r, 1, near + t * r * l, 0, l, middle + t * r * l, 1, r, r, l}, 0, 0, r);
  }
  product_piece({near, 0, 1, l, middle, 0, l, out, 1, l, rows, l}, 0, 0, l);
}

void joint_gram(const JointGramJob& job, int threads) {
  const std::int64_t l = job.l, square = l * l;
  fill(job.out, square, 0);
  if (job.count == 0 || job.r == 0 || square == 0) return;
  // full sums of product are worth a group
  const std::int64_t full = (kProductTerms + job.r - 1) / job.r, few = (job.count + kJointGroups - 1) / kJointGroups;
  const std::int64_t tasks = max_of(full, few), groups = (job.count + tasks - 1) / tasks;
  double* parts = scratch<double>(Use::sums, groups * square);
  parallel_for(groups, threads, [&](std::int64_t group) {
    joint_group(job, group * tasks, min_of(job.count, (group + 1) * tasks), parts + group * square);
  });
  for (std::int64_t group = 0; group < groups; ++group)
    for (std::int64_t i = 0; i < l; ++i)
      for (std::int64_t j = 0; j < l; ++j)
        job.out[i * l + j] += (parts[group * square + i * l + j] + parts[group * square + j * l + i]) / 2;
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
