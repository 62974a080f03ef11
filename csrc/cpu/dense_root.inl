// root: Cholesky of a Gram scaled to a unit diagonal, with the inverse of the factor; by eigenvectors where a pivot is
// too small to tell a dependent row from rounding.
namespace loraspan {
namespace LORASPAN_ISA {

// A pivot of the scaled Gram below this goes to the eigenvectors, which tell small from absent.
constexpr double kPivotFloor = 1e-10;
// Eigenvalues of the scaled Gram below this, times its size and the largest, are rounding.
constexpr double kRankFloor = 1e-15;

// The scaled Gram in rows of `stride`, and the scales; a zero vector becomes a unit one of its own.
inline void scale_gram(const double* gram, std::int64_t n, std::int64_t stride, double* scaled, double* scales) {
  for (std::int64_t i = 0; i < n; ++i) scales[i] = gram[i * n + i] > 0 ? __builtin_sqrt(gram[i * n + i]) : 0;
  for (std::int64_t i = 0; i < n; ++i) {
    double* row = scaled + i * stride;
    fill(row, stride, 0);
    if (scales[i] == 0) {
      row[i] = 1;
      continue;
    }
    for (std::int64_t j = 0; j < n; ++j) row[j] = scales[j] > 0 ? gram[i * n + j] / scales[i] / scales[j] : 0;
  }
}

// Rows of the upper factor R, R^T R = scaled, in place (what lies left of the diagonal is left as it is).
inline bool cholesky_rows(std::int64_t n, std::int64_t stride, double* r) {
  constexpr int L = kLanes<double>;
  for (std::int64_t i = 0; i < n; ++i) {
    double* row = r + i * stride;
    for (std::int64_t k = 0; k < i; ++k) add_multiple(row, -r[k * stride + i], r + k * stride, i / L * L, stride);
    if (!(row[i] > kPivotFloor)) return false;
    const double inverse = 1 / __builtin_sqrt(row[i]);
    for (std::int64_t j = i; j < n; ++j) row[j] *= inverse;
  }
  return true;
}

// The inverse of the upper triangular R, row by row from the last.
inline void invert_rows(std::int64_t n, std::int64_t stride, const double* r, double* inverse) {
  constexpr int L = kLanes<double>;
  for (std::int64_t i = n - 1; i >= 0; --i) {
    double* row = inverse + i * stride;
    fill(row, stride, 0);
    for (std::int64_t k = i + 1; k < n; ++k)
      add_multiple(row, -r[i * stride + k], inverse + k * stride, k / L * L, stride);
    row[i] = 1;
    const double factor = 1 / r[i * stride + i];
    for (std::int64_t j = i; j < n; ++j) row[j] *= factor;
  }
}

// R = sqrt(values) vectors^T of the scaled Gram, and its pseudo-inverse; zero rows and columns for what is absent.
inline bool root_by_eigenvectors(const EighWork& s, const double* scales, double* r, double* inverse) {
  const std::int64_t n = s.n;
  if (!eigh_rows(s)) return false;
  const double floor = kRankFloor * static_cast<double>(n) * larger(0, s.d[s.order[0]]);
  for (std::int64_t i = 0; i < n; ++i) {
    const double value = s.d[s.order[i]];
    const bool present = value > floor;
    const double root = present ? __builtin_sqrt(value) : 0, reciprocal = present ? 1 / root : 0;
    const double* vector = s.vectors + s.order[i] * s.stride;
    for (std::int64_t j = 0; j < n; ++j) {
      r[i * n + j] = root * vector[j] * scales[j];
      inverse[j * n + i] = scales[j] > 0 ? reciprocal * vector[j] / scales[j] : 0;
    }
  }
  return true;
}

inline void root_one(const double* gram, std::int64_t n, double* r, double* inverse) {
  // the eigenvectors' work, if they are needed, starts with the scaled Gram
  const EighWork s = eigh_work(n, scratch<double>(Use::packed, eigh_work_size(n)));
  double* scales = scratch<double>(Use::weights, n);
  scale_gram(gram, n, s.stride, s.a, scales);
  bool done = unit_scale(s.a, n * s.stride) != 0;
  if (done && cholesky_rows(n, s.stride, s.a)) {
    invert_rows(n, s.stride, s.a, s.vectors);
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < n; ++j) {
        r[i * n + j] = j < i ? 0 : s.a[i * s.stride + j] * scales[j];
        inverse[i * n + j] = scales[i] > 0 ? s.vectors[i * s.stride + j] / scales[i] : 0;
      }
    return;
  }
  scale_gram(gram, n, s.stride, s.a, scales);
  if (done && root_by_eigenvectors(s, scales, r, inverse)) return;
  fill(r, n * n, __builtin_nan(""));
  fill(inverse, n * n, __builtin_nan(""));
}

void root(const RootJob& job, int threads) {
  const std::int64_t square = job.n * job.n;
  if (job.n == 0) return;
  parallel_for(job.count, threads, [&](std::int64_t i) {
    root_one(job.gram + i * square, job.n, job.r + i * square, job.inverse + i * square);
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
