// svd: one-sided Jacobi rotations of the columns until they are orthogonal (Hestenes 1958; order by norm as de Rijk
// 1989), which finds small singular values to their own accuracy. Columns lie in rows.
namespace loraspan {
namespace LORASPAN_ISA {

constexpr int kJacobiSweeps = 40;  // six to ten are usual
// More columns than this start from the eigenvectors of their Gram, which leave few rotations to be made.
constexpr std::int64_t kFromEigenvectors = 24;

struct SvdWork {
  std::int64_t m, n, stride, v_stride;
  double *columns, *v, *norms;  // [n, stride], [n, v_stride], squares [n]
  std::int64_t* order;
};

inline SvdWork svd_work(std::int64_t m, std::int64_t n) {
  const std::int64_t stride = padded_row(m), v_stride = padded_row(n);
  double* memory = scratch<double>(Use::packed, n * (stride + v_stride + 2));
  double* norms = memory + n * (stride + v_stride);
  return {m, n, stride, v_stride, memory, memory + n * stride, norms, reinterpret_cast<std::int64_t*>(norms + n)};
}

// Makes columns p and q orthogonal; false if they were.
inline bool orthogonalize_pair(const SvdWork& s, std::int64_t p, std::int64_t q, double tolerance) {
  double *x = s.columns + p * s.stride, *y = s.columns + q * s.stride;
  const double product = dot(x, y, 0, s.stride), a = s.norms[p], b = s.norms[q];
  if (!(product * product > tolerance * tolerance * a * b)) return false;
  const double zeta = (b - a) / (2 * product), size = zeta < 0 ? -zeta : zeta;
  // past 1e150 its square is no number, and the angle is 1 / (2 zeta)
  const double t = (zeta < 0 ? -1 : 1) / (size + (size < 1e150 ? __builtin_sqrt(1 + size * size) : size));
  const double c = 1 / __builtin_sqrt(1 + t * t);
  rotate(x, y, c, c * t, s.stride);
  rotate(s.v + p * s.v_stride, s.v + q * s.v_stride, c, c * t, s.v_stride);
  s.norms[p] = larger(0, a - t * product);
  s.norms[q] = larger(0, b + t * product);
  return true;
}

inline void measure_norms(const SvdWork& s) {
  for (std::int64_t j = 0; j < s.n; ++j)
    s.norms[j] = dot(s.columns + j * s.stride, s.columns + j * s.stride, 0, s.stride);
}

inline bool orthogonalize_columns(const SvdWork& s) {
  const double tolerance = __builtin_sqrt(static_cast<double>(s.m)) * 2 * kRoundoff;
  for (int sweep = 0; sweep < kJacobiSweeps; ++sweep) {
    bool rotated = false;
    measure_norms(s);
    sort_descending(s.norms, s.n, s.order);
    for (std::int64_t p = 0; p < s.n; ++p)
      for (std::int64_t q = p + 1; q < s.n; ++q) rotated |= orthogonalize_pair(s, s.order[p], s.order[q], tolerance);
    if (!rotated) return true;
  }
  return false;
}

// Cosines below this leave few rotations to be made, and small ones.
constexpr double kNearlyOrthogonal = 1e-2;

// Turns the columns, unless they are nearly orthogonal, by the eigenvectors of their Gram: then they are but for its
// rounding.
inline bool turn_columns(const SvdWork& s) {
  const EighWork e = eigh_work(s.n, scratch<double>(Use::basis, eigh_work_size(s.n)));
  double* turned = scratch<double>(Use::tile, s.n * s.stride);
  fill(e.a, s.n * e.stride, 0);
  for (std::int64_t i = 0; i < s.n; ++i)
    for (std::int64_t j = 0; j <= i; ++j)
      e.a[i * e.stride + j] = e.a[j * e.stride + i] =
          dot(s.columns + i * s.stride, s.columns + j * s.stride, 0, s.stride);
  bool turn = false;
  for (std::int64_t i = 0; i < s.n; ++i)
    for (std::int64_t j = 0; j < i; ++j) {
      const double g = e.a[i * e.stride + j];
      turn |= g * g > kNearlyOrthogonal * kNearlyOrthogonal * e.a[i * e.stride + i] * e.a[j * e.stride + j];
    }
  if (!turn) return true;
  if (!eigh_rows(e)) return false;
  fill(turned, s.n * s.stride, 0);
  for (std::int64_t j = 0; j < s.n; ++j) {
    const double* vector = e.vectors + e.order[j] * e.stride;
    for (std::int64_t i = 0; i < s.n; ++i)
      add_multiple(turned + j * s.stride, vector[i], s.columns + i * s.stride, 0, s.stride);
    for (std::int64_t i = 0; i < s.v_stride; ++i) s.v[j * s.v_stride + i] = vector[i];
  }
  for (std::int64_t i = 0; i < s.n * s.stride; ++i) s.columns[i] = turned[i];
  return true;
}

inline void svd_one(const double* a, std::int64_t m, std::int64_t n, double* u, double* sv, double* v) {
  const SvdWork s = svd_work(m, n);
  const double scale = unit_scale(a, m * n);
  fill(s.columns, n * s.stride, 0);
  fill(s.v, n * s.v_stride, 0);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) s.columns[j * s.stride + i] = scale * a[i * n + j];
  for (std::int64_t j = 0; j < n; ++j) s.v[j * s.v_stride + j] = 1;
  if (scale == 0 || (n > kFromEigenvectors && !turn_columns(s)) || !orthogonalize_columns(s)) {
    fill(u, m * n, __builtin_nan(""));
    fill(sv, n, __builtin_nan(""));
    return fill(v, n * n, __builtin_nan(""));
  }
  for (std::int64_t j = 0; j < n; ++j) {
    const std::int64_t from = s.order[j];
    const double size = __builtin_sqrt(s.norms[from]), inverse = size > 0 ? 1 / size : 0;
    sv[j] = size / scale;
    for (std::int64_t i = 0; i < m; ++i) u[i * n + j] = inverse * s.columns[from * s.stride + i];
    for (std::int64_t i = 0; i < n; ++i) v[i * n + j] = s.v[from * s.v_stride + i];
  }
}

void svd(const SvdJob& job, int threads) {
  if (job.n == 0) return;
  parallel_for(job.count, threads, [&](std::int64_t i) {
    svd_one(job.a + i * job.m * job.n, job.m, job.n, job.u + i * job.m * job.n, job.s + i * job.n,
            job.v + i * job.n * job.n);
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
