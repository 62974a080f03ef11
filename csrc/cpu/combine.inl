// combine: per chunk of columns, V = X^T W in register tiles, rounded and written, then X V and V^T V of what was
// written while the chunk is in cache. Slabs of columns have their own float64 sums, added in order at the end.
namespace loraspan {
namespace LORASPAN_ISA {

struct CombineShape {
  std::int64_t rows, k;
  std::int64_t padded_rows;  // rows up to whole tiles
  std::int64_t vectors;      // of T that hold k entries
  std::int64_t width;        // k up to whole vectors: the row stride of the sums
  std::int64_t padded_k;     // k up to whole tiles: the rows of V^T V
  std::int64_t slab_width;

  std::int64_t sums() const { return (padded_rows + padded_k) * width; }
};

template <typename T>
inline CombineShape combine_shape(const CombineJob& job) {
  constexpr int L = kLanes<T>, M = kTileRows;
  const std::int64_t rows = row_count(job.x), vectors = (job.k + L - 1) / L;
  const std::int64_t least = max_of(512, (std::int64_t{1} << 18) / max_of(rows, 1));
  return {rows,
          job.k,
          round_up(rows, M),
          vectors,
          vectors * L,
          round_up(vectors * L, M > L ? M : L),
          slab_columns(job.x.columns, least, 32)};
}

// How many vectors of `left` the next tile takes; four go as two and two, for a tile of one is bound by its loads.
inline std::int64_t tile_vectors(std::int64_t left) {
  return left == 4 && kTileVectors == 3 ? 2 : min_of(left, kTileVectors);
}

// body(j, size) for groups of vectors [j, j + size) that cover [0, count); size.value is a constant.
template <int N>
struct VectorCount {
  static constexpr int value = N;
};

template <typename Body>
inline __attribute__((always_inline)) void for_tile_groups(std::int64_t count, const Body& body) {
  for (std::int64_t j = 0; j < count;) {
    const std::int64_t take = tile_vectors(count - j);
    if (take == kTileVectors)
      body(j, VectorCount<kTileVectors>{});
    else if (take == 2)
      body(j, VectorCount<2>{});
    else
      body(j, VectorCount<1>{});
    j += take;
  }
}

// W [R, k] float64 as panels: row i of vector j at panels[(j * R + i) * L].
template <typename T>
inline void pack_weights(const CombineJob& job, const CombineShape& s, T* panels) {
  constexpr int L = kLanes<T>;
  for (std::int64_t i = 0; i < s.rows; ++i)
    for (std::int64_t j = 0; j < s.vectors; ++j) {
      const double* w = job.w + i * s.k + j * L;
      const std::int64_t n = min_of(L, s.k - j * L);
      store(panels + (j * s.rows + i) * L, n == L ? load_as<T>(w) : load_first<T>(w, n));
    }
}

// Rounds the first n lanes of x to the entries of type S from p on, `stride` apart; gives them as they are now.
template <typename S, typename T>
inline Vec<T> round_to(S* p, std::int64_t stride, std::int64_t n, Vec<T> x) {
  constexpr int L = kLanes<T>;
  if (stride == 1 && n == L) {
    store_as(p, x);
    return load_as<T>(static_cast<const S*>(p));
  }
  S rounded[L];
  store_as(rounded, x);
  for (std::int64_t i = 0; i < n; ++i) p[i * stride] = rounded[i];
  return load_as<T>(static_cast<const S*>(rounded));
}

// Rows [c, c + M) of V, of which those below `end` exist, in vectors [j, j + N); column c0 of X is row 0 of `basis`.
template <typename T, int M, int N>
__attribute__((noinline)) void basis_tile(const CombineJob& job, const CombineShape& s, const T* strips,
                                          std::int64_t strip_stride, const T* weights, std::int64_t c0, std::int64_t c,
                                          std::int64_t end, std::int64_t j, T* basis) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[M][N] = {};
  sum_along<T, M, N>(strips + c / L * strip_stride + c % L, strip_stride, weights + j * s.rows * L, s.rows * L, s.rows,
                     sums);
  alignas(64) T rows[M * N * L];
  LORASPAN_UNROLL
  for (int i = 0; i < M; ++i) LORASPAN_UNROLL
  for (int q = 0; q < N; ++q) store(rows + (i * N + q) * L, sums[i][q]);
  with_type(job.v, job.v_dtype, [&](auto* v) {
    using S = typename Writable<decltype(v)>::type;
    S* out = const_cast<S*>(v);
    for (std::int64_t i = 0; i < min_of(M, end - c); ++i)
      for (std::int64_t q = 0; q < N; ++q) {
        S* p = out + (c0 + c + i) * job.v_row_stride + (j + q) * L * job.v_col_stride;
        const Vec<T> stored =
            round_to<S, T>(p, job.v_col_stride, min_of(L, s.k - (j + q) * L), load(rows + (i * N + q) * L));
        store(basis + ((j + q) * kFlush + c + i) * L, stored);
      }
  });
}

// Adds M rows of X V, or of V^T V, in N vectors.
template <typename T, int M, int N, bool kAcross>
__attribute__((noinline)) void product_tile(const T* a, std::int64_t a_stride, const T* basis, std::int64_t n,
                                            double* out, std::int64_t out_stride) {
  constexpr int L = kLanes<T>;
  for (int i = 0; i < M; ++i)
    for (int c = 0; c < N * L; c += 8) __builtin_prefetch(out + i * out_stride + c, 1);
  Vec<T> sums[M][N] = {};
  if constexpr (kAcross)
    sum_across<T, M, N>(a, a_stride, basis, kFlush * L, n, sums);
  else
    sum_along<T, M, N>(a, a_stride, basis, kFlush * L, n, sums);
  LORASPAN_UNROLL
  for (int i = 0; i < M; ++i) LORASPAN_UNROLL
  for (int j = 0; j < N; ++j) flush<true>(out + i * out_stride + j * L, sums[i][j]);
}

// One chunk of at most kFlush columns, all its rows.
template <typename T>
inline void combine_chunk(const CombineJob& job, const CombineShape& s, const T* weights, std::int64_t c0,
                          std::int64_t n, T* strips, T* basis, double* sums) {
  constexpr int L = kLanes<T>, M = kTileRows;
  const std::int64_t stride = s.padded_rows * L + L;
  pack_strips(job.x, 0, s.rows, c0, n, strips, stride);
  for (std::int64_t strip = 0; strip * L < round_up(n, M); ++strip)
    for (std::int64_t i = strip * L < n ? s.rows : 0; i < s.padded_rows; ++i)
      store(strips + strip * stride + i * L, Vec<T>{});
  for (std::int64_t c = 0; c < n; c += M)
    for_tile_groups(s.vectors, [&](std::int64_t j, auto size) {
      basis_tile<T, M, decltype(size)::value>(job, s, strips, stride, weights, c0, c, n, j, basis);
    });
  for (std::int64_t i = 0; i < s.padded_rows; i += M)
    for_tile_groups(s.vectors, [&](std::int64_t j, auto size) {
      product_tile<T, M, decltype(size)::value, true>(strips + i * L, stride, basis + j * kFlush * L, n,
                                                      sums + i * s.width + j * L, s.width);
    });
  double* vtv = sums + s.padded_rows * s.width;
  for (std::int64_t i = 0; i < s.padded_k; i += M)
    for_tile_groups(min_of(s.vectors, (i + M - 1) / L + 1), [&](std::int64_t j, auto size) {
      product_tile<T, M, decltype(size)::value, false>(basis + i / L * kFlush * L + i % L, kFlush * L,
                                                       basis + j * kFlush * L, n, vtv + i * s.width + j * L, s.width);
    });
}

template <typename T>
inline void combine_slab(const CombineJob& job, std::int64_t slab, double* sums) {
  constexpr int L = kLanes<T>;
  const CombineShape s = combine_shape<T>(job);
  constexpr std::int64_t kStrips = kFlush / L;
  T* weights = scratch<T>(Use::weights, s.rows * s.width);
  T* strips = scratch<T>(Use::packed, kStrips * (s.padded_rows * L + L));
  // V^T V reads whole tiles of rows: those past the last vector are never written, so they must not hold a NaN trap
  T* basis = scratch<T>(Use::basis, s.padded_k * kFlush);
  for (std::int64_t i = s.width * kFlush; i < s.padded_k * kFlush; ++i) basis[i] = 0;
  pack_weights(job, s, weights);
  for (std::int64_t i = 0; i < s.sums(); ++i) sums[i] = 0;
  const std::int64_t end = min_of(job.x.columns, (slab + 1) * s.slab_width);
  for (std::int64_t c = slab * s.slab_width; c < end; c += kFlush)
    combine_chunk(job, s, weights, c, min_of(kFlush, end - c), strips, basis, sums);
}

// Adds the slabs in order and writes a share of the rows of X V and of V^T V.
template <typename T>
inline void finish_combine(const CombineJob& job, std::int64_t slabs, const double* sums, std::int64_t part,
                           std::int64_t parts) {
  const CombineShape s = combine_shape<T>(job);
  const auto total = [&](std::int64_t at) {
    double sum = sums[at];
    for (std::int64_t slab = 1; slab < slabs; ++slab) sum += sums[slab * s.sums() + at];
    return sum;
  };
  for (std::int64_t i = s.rows * part / parts; i < s.rows * (part + 1) / parts; ++i)
    for (std::int64_t j = 0; j < s.k; ++j) job.xv[i * s.k + j] = total(i * s.width + j);
  for (std::int64_t i = s.k * part / parts; i < s.k * (part + 1) / parts; ++i)
    for (std::int64_t j = 0; j <= i; ++j)
      job.vtv[i * s.k + j] = job.vtv[j * s.k + i] = total((s.padded_rows + i) * s.width + j);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
