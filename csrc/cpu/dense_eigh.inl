// eigh: Householder reflections to a tridiagonal matrix, then implicit QL steps (Martin, Reinsch, Wilkinson 1968;
// Dubrulle, Martin, Wilkinson 1968). The eigenvectors lie in rows, so that a step works along contiguous memory.
namespace loraspan {
namespace LORASPAN_ISA {

constexpr int kQlSteps = 60;  // for one eigenvalue; three are usual
// Entries of T below this are nothing beside the rounding of a matrix whose largest entry is near 1. To ask for more
// would keep the steps stirring in what rounding left at the end of the spectrum.
constexpr double kAbsent = kRoundoff / 4;

// The work of one matrix: a, reflectors and vectors [n, stride]; d, e, w, next [stride]; rotations [2, stride].
struct EighWork {
  std::int64_t n, stride;
  double *a, *reflectors, *vectors, *d, *e, *w, *next, *rotations, *taus;
  std::int64_t* order;
};

inline std::int64_t eigh_work_size(std::int64_t n) { return (3 * n + 8) * padded_row(n); }

inline EighWork eigh_work(std::int64_t n, double* memory) {
  const std::int64_t stride = padded_row(n), square = n * stride;
  double* rows = memory + 3 * square;
  return {n,
          stride,
          memory,
          memory + square,
          memory + 2 * square,
          rows,
          rows + stride,
          rows + 2 * stride,
          rows + 3 * stride,
          rows + 4 * stride,
          rows + 6 * stride,
          reinterpret_cast<std::int64_t*>(rows + 7 * stride)};
}

// The reflection that takes entries [k + 1, n) of `row` to a multiple of the first of them: v, with v[k + 1] = 1, zero
// elsewhere. Gives its factor, and the multiple in `e`.
inline double make_reflection(const double* row, std::int64_t k, const EighWork& s, double* v, double& e) {
  constexpr int L = kLanes<double>;
  const std::int64_t first = (k + 1) / L * L;
  fill(v, s.stride, 0);
  for (std::int64_t i = k + 1; i < s.n; ++i) v[i] = row[i];
  const double alpha = v[k + 1];
  v[k + 1] = 0;
  const double rest = dot(v, v, first, s.stride);
  e = alpha;
  v[k + 1] = 1;
  if (rest <= kRoundoff * kRoundoff * kRoundoff * kRoundoff) {
    for (std::int64_t i = k + 2; i < s.n; ++i) v[i] = 0;
    return 0;
  }
  const double norm = __builtin_sqrt(alpha * alpha + rest);
  e = alpha > 0 ? -norm : norm;
  const double scale = 1 / (alpha - e);
  for (std::int64_t i = k + 2; i < s.n; ++i) v[i] *= scale;
  return (e - alpha) / e;
}

// Rows [i, i + M) of a: subtracts v_i w + w_i v, and gives their products with `next`, all from entry `first` on.
template <int M>
inline void update_rows(const EighWork& s, std::int64_t i, const double* v, const double* next, std::int64_t first,
                        double* products) {
  Vec<double> vi[M], wi[M], sums[M] = {};
  LORASPAN_UNROLL
  for (int r = 0; r < M; ++r) vi[r] = broadcast(v[i + r]), wi[r] = broadcast(s.w[i + r]);
  for (std::int64_t j = first; j < s.stride; j += kLanes<double>) {
    const Vec<double> vj = load(v + j), wj = load(s.w + j), nj = load(next + j);
    LORASPAN_UNROLL
    for (int r = 0; r < M; ++r) {
      double* p = s.a + (i + r) * s.stride + j;
      const Vec<double> updated = load(p) - vi[r] * wj - wi[r] * vj;
      store(p, updated);
      sums[r] = updated * nj + sums[r];
    }
  }
  LORASPAN_UNROLL
  for (int r = 0; r < M; ++r) products[i + r] = add_lanes(sums[r]);
}

// w = tau p - (tau^2 / 2) (p . v) v, with p the products of the trailing rows with v.
inline void make_update(const EighWork& s, const double* v, double tau, std::int64_t first) {
  const double half = -0.5 * tau * tau * dot(s.w, v, first, s.stride);
  for (std::int64_t j = first; j < s.stride; ++j) s.w[j] = tau * s.w[j] + half * v[j];
}

// a = Q T Q^T: d and e get the diagonals of T; Q is the product of the reflections in order.
inline void tridiagonalize(const EighWork& s) {
  constexpr int L = kLanes<double>;
  const std::int64_t n = s.n;
  for (std::int64_t k = 0; k + 1 < n; ++k) {
    double* row = s.a + k * s.stride;
    double* v = s.reflectors + k * s.stride;
    const double* before = k ? v - s.stride : nullptr;
    // the row that the new reflection is made from is brought up to date first, the others in the pass that uses it
    if (k) {
      for (std::int64_t j = k; j < n; ++j) row[j] -= before[k] * s.w[j] + s.w[k] * before[j];
    }
    s.d[k] = row[k];
    s.taus[k] = make_reflection(row, k, s, v, s.e[k]);
    if (!k) {
      fill(s.w, s.stride, 0);
      before = s.w;
    }
    const std::int64_t first = (k + 1) / L * L;
    fill(s.next, s.stride, 0);
    std::int64_t i = k + 1;
    for (; i + 4 <= n; i += 4) update_rows<4>(s, i, before, v, first, s.next);
    for (; i < n; ++i) update_rows<1>(s, i, before, v, first, s.next);
    for (std::int64_t j = 0; j < s.stride; ++j) s.w[j] = s.next[j];
    make_update(s, v, s.taus[k], first);
  }
  double* last = s.a + (n - 1) * s.stride;
  if (n > 1) last[n - 1] -= 2 * s.reflectors[(n - 2) * s.stride + n - 1] * s.w[n - 1];
  s.d[n - 1] = last[n - 1];
  s.e[n - 1] = 0;
}

// The rows of Q^T, which the QL steps turn into eigenvectors, and with them T in reverse order: the reflections leave
// what is large at its start, where QL steps, which go from the end to the start, would stir what is small for ever.
inline void form_vectors(const EighWork& s) {
  constexpr int L = kLanes<double>;
  fill(s.vectors, s.n * s.stride, 0);
  const auto row_of = [&](std::int64_t i) { return s.vectors + (s.n - 1 - i) * s.stride; };
  for (std::int64_t i = 0; i < s.n; ++i) row_of(i)[i] = 1;
  for (std::int64_t k = s.n - 2; k >= 0; --k) {
    const double* v = s.reflectors + k * s.stride;
    const std::int64_t first = (k + 1) / L * L;
    for (std::int64_t i = k + 1; i < s.n && s.taus[k] != 0; ++i) {
      double* row = row_of(i);
      add_multiple(row, -s.taus[k] * dot(row, v, first, s.stride), v, first, s.stride);
    }
  }
  const auto reverse = [](double* x, std::int64_t count) {
    for (std::int64_t i = 0, j = count - 1; i < j; ++i, --j) {
      const double kept = x[i];
      x[i] = x[j];
      x[j] = kept;
    }
  };
  reverse(s.d, s.n);
  reverse(s.e, s.n - 1);
}

// The rotations of one QL step to rows [l, m] of the vectors; the row that moves down stays in registers.
template <int N>
inline void rotate_rows(const EighWork& s, std::int64_t l, std::int64_t m, std::int64_t j) {
  constexpr int L = kLanes<double>;
  Vec<double> moving[N];
  double* base = s.vectors + j;
  LORASPAN_UNROLL
  for (int q = 0; q < N; ++q) moving[q] = load(base + m * s.stride + q * L);
  for (std::int64_t i = m - 1; i >= l; --i) {
    const Vec<double> c = broadcast(s.rotations[2 * i]), t = broadcast(s.rotations[2 * i + 1]);
    double* row = base + i * s.stride;
    LORASPAN_UNROLL
    for (int q = 0; q < N; ++q) {
      const Vec<double> x = load(row + q * L);
      store(row + s.stride + q * L, t * x + c * moving[q]);
      moving[q] = c * x - t * moving[q];
    }
  }
  LORASPAN_UNROLL
  for (int q = 0; q < N; ++q) store(base + l * s.stride + q * L, moving[q]);
}

inline void rotate_all(const EighWork& s, std::int64_t l, std::int64_t m) {
  constexpr int L = kLanes<double>;
  std::int64_t j = 0;
  for (; j + 4 * L <= s.stride; j += 4 * L) rotate_rows<4>(s, l, m, j);
  for (; j < s.stride; j += L) rotate_rows<1>(s, l, m, j);
}

// One implicit QL step on the block [l, m] of T; false if a rotation broke it in two.
inline void ql_step(const EighWork& s, std::int64_t l, std::int64_t m) {
  double g = (s.d[l + 1] - s.d[l]) / (2 * s.e[l]);
  const double root = __builtin_sqrt(g * g + 1);
  g = s.d[m] - s.d[l] + s.e[l] / (g > 0 ? g + root : g - root);
  double sine = 1, cosine = 1, p = 0;
  for (std::int64_t i = m - 1; i >= l; --i) {
    const double f = sine * s.e[i], b = cosine * s.e[i], r = __builtin_sqrt(f * f + g * g);
    s.e[i + 1] = r;
    if (r == 0) {
      s.d[i + 1] -= p;
      s.e[m] = 0;
      if (i + 1 < m) rotate_all(s, i + 1, m);
      return;
    }
    sine = f / r;
    cosine = g / r;
    const double shifted = s.d[i + 1] - p, t = (s.d[i] - shifted) * sine + 2 * cosine * b;
    p = sine * t;
    s.d[i + 1] = shifted + p;
    g = cosine * t - b;
    s.rotations[2 * i] = cosine;
    s.rotations[2 * i + 1] = sine;
  }
  rotate_all(s, l, m);
  s.d[l] -= p;
  s.e[l] = g;
  s.e[m] = 0;
}

inline bool diagonalize(const EighWork& s) {
  const auto magnitude = [](double x) { return x < 0 ? -x : x; };
  for (std::int64_t l = 0; l < s.n; ++l)
    for (int step = 0;; ++step) {
      std::int64_t m = l;
      while (m + 1 < s.n && !(magnitude(s.e[m]) <= kRoundoff * (magnitude(s.d[m]) + magnitude(s.d[m + 1])) + kAbsent))
        ++m;
      if (m == l) break;
      if (step == kQlSteps) return false;
      ql_step(s, l, m);
    }
  return true;
}

// Fills s.a, whose both triangles must hold the matrix, then d (not in order), vectors (rows) and the order.
inline bool eigh_rows(const EighWork& s) {
  tridiagonalize(s);
  form_vectors(s);
  if (!diagonalize(s)) return false;
  sort_descending(s.d, s.n, s.order);
  return true;
}

inline void eigh_one(const double* a, std::int64_t n, double* values, double* vectors) {
  const EighWork s = eigh_work(n, scratch<double>(Use::packed, eigh_work_size(n)));
  double scale = 1;
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) s.a[i * s.stride + j] = s.a[j * s.stride + i] = a[i * n + j];
    fill(s.a + i * s.stride + n, s.stride - n, 0);
  }
  scale = unit_scale(s.a, n * s.stride);
  for (std::int64_t i = 0; i < n * s.stride; ++i) s.a[i] *= scale;
  if (scale == 0 || !eigh_rows(s)) {
    fill(values, n, __builtin_nan(""));
    return fill(vectors, n * n, __builtin_nan(""));
  }
  for (std::int64_t j = 0; j < n; ++j) {
    const std::int64_t from = s.order[j];
    values[j] = s.d[from] / scale;
    for (std::int64_t i = 0; i < n; ++i) vectors[i * n + j] = s.vectors[from * s.stride + i];
  }
}

void eigh(const EighJob& job, int threads) {
  const std::int64_t square = job.n * job.n;
  if (job.n == 0) return;
  parallel_for(job.count, threads, [&](std::int64_t i) {
    eigh_one(job.a + i * square, job.n, job.values + i * job.n, job.vectors + i * square);
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
