// product: tiles of sums in registers, rows of B read where they lie, entries of A wherever they lie.
namespace loraspan {
namespace LORASPAN_ISA {

// Rows of one A that are one piece of work.
constexpr std::int64_t kProductRows = 64;

// M rows of C, N vectors of each, of which the last has `lanes` entries; adds to what is there unless `first`.
template <int M, int N>
inline void product_tile(const double* a, std::int64_t a_row, std::int64_t a_column, const double* b,
                         std::int64_t b_row, std::int64_t k, double* c, std::int64_t c_row, std::int64_t lanes,
                         bool first) {
  constexpr int L = kLanes<double>;
  Vec<double> sums[M][N] = {};
  for (std::int64_t p = 0; p < k; ++p) {
    Vec<double> v[N];
    LORASPAN_UNROLL
    for (int j = 0; j < N; ++j) v[j] = load(b + p * b_row + j * L);
    LORASPAN_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec<double> w = broadcast(a[i * a_row + p * a_column]);
      LORASPAN_UNROLL
      for (int j = 0; j < N; ++j) sums[i][j] = w * v[j] + sums[i][j];
    }
  }
  LORASPAN_UNROLL
  for (int i = 0; i < M; ++i) LORASPAN_UNROLL
  for (int j = 0; j < N; ++j) {
    double* to = c + i * c_row + j * L;
    const std::int64_t n = j + 1 < N ? L : lanes;
    const Vec<double> before = first ? Vec<double>{} : load_first<double>(static_cast<const double*>(to), n);
    store_first<double>(to, before + sums[i][j], n);
  }
}

template <int M>
inline void product_rows(const ProductJob& job, const double* a, const double* b, std::int64_t b_row, std::int64_t k,
                         double* c, bool first) {
  constexpr int L = kLanes<double>;
  for_vectors((job.n + L - 1) / L, [&](std::int64_t at, auto size) {
    constexpr int N = decltype(size)::value;
    product_tile<M, N>(a, job.a_row, job.a_column, b + at * L, b_row, k, c + at * L, job.n,
                       min_of(L, job.n - (at + N - 1) * L), first);
  });
}

// Rows [i0, i1) of C_t.
inline void product_piece(const ProductJob& job, std::int64_t t, std::int64_t i0, std::int64_t i1) {
  constexpr int L = kLanes<double>;
  const double* a = job.a + t * job.a_step;
  double* c = job.c + t * job.m * job.n;
  const std::int64_t wide = round_up(job.n, L);
  double* packed = scratch<double>(Use::packed, kProductTerms * wide);
  for (std::int64_t p = 0; p < max_of(1, job.k); p += kProductTerms) {
    const std::int64_t k = min_of(kProductTerms, job.k - p);
    const double* b = job.b + t * job.b_step + p * job.b_row;
    std::int64_t b_row = job.b_row;
    if (job.n != wide) {
      // whole vectors may only be read where there are such
      for (std::int64_t q = 0; q < k; ++q)
        for (std::int64_t j = 0; j < wide; ++j) packed[q * wide + j] = j < job.n ? b[q * b_row + j] : 0.0;
      b = packed;
      b_row = wide;
    }
    std::int64_t i = i0;
    const auto rows = [&](auto size) {
      constexpr int M = decltype(size)::value;
      for (; i + M <= i1; i += M)
        product_rows<M>(job, a + i * job.a_row + p * job.a_column, b, b_row, k, c + i * job.n, p == 0);
    };
    rows(Constant<kTileRows>{});
    rows(Constant<2>{});
    rows(Constant<1>{});
  }
}

void product(const ProductJob& job, int threads) {
  const std::int64_t pieces = (job.m + kProductRows - 1) / kProductRows, all = job.count * pieces;
  if (job.n == 0) return;
  const std::int64_t tasks = min_of(all, 4 * threads);
  parallel_for(tasks, threads, [&](std::int64_t task) {
    for (std::int64_t i = all * task / tasks; i < all * (task + 1) / tasks; ++i)
      product_piece(job, i / pieces, i % pieces * kProductRows, min_of(job.m, (i % pieces + 1) * kProductRows));
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
