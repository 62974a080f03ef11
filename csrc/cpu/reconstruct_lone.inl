// A product that shares its basis with no other. To turn the basis into panels would not pay, since it is used but
// once: its rows are multiplied as they lie, with the columns of loadings for vectors, and what is turned is the
// result, if its place asks for that. Sums over k in the same order, so the same bits.
namespace loraspan {
namespace LORASPAN_ISA {

// Rows at a time: columns of two-byte entries fill whole lines.
constexpr std::int64_t kLoneRows = 32;

inline Matrix turned(const Matrix& a) { return {a.data, a.col_stride, a.row_stride, a.dtype}; }

// Rows [first, first + rows) of a row-major matrix with k columns, as strips of kLoneRows rows.
template <typename T>
inline void lone_strips(const Matrix& a, std::int64_t k, std::int64_t first, std::int64_t rows, T* strips) {
  constexpr std::int64_t L = kLanes<T>;
  const std::int64_t step = a.row_stride;
  with_type(a.data, a.dtype, [=](auto* data) {
    for (std::int64_t c = 0; c < k; c += L) {
      auto* p = data + first * step + c;
      T* to = strips + c * kLoneRows;
      const std::int64_t width = k - c;
      if (width < L) {
        for (std::int64_t i = 0; i < rows; ++i, p += step) store(to + i * L, load_first<T>(p, width));
        continue;
      }
#pragma GCC unroll 4
      for (std::int64_t i = 0; i < rows; ++i, p += step) store(to + i * L, load_as<T>(p));
    }
  });
}

// sums[v][i] = row i of the strips times vector v of loadings. Memory from `coming` on is brought near meanwhile, as
// much as so many rows of `row_bytes` are.
template <typename T, int N>
inline void lone_sums(const T* strips, std::int64_t k, std::int64_t rows, const T* loadings, std::int64_t panel,
                      std::uintptr_t coming, std::uintptr_t row_bytes, T* sums) {
  constexpr int L = kLanes<T>, M = kRowsBeside<N>;
  const std::uintptr_t step = M * row_bytes / static_cast<std::uintptr_t>(max_of(1, k));
  for (std::int64_t r = 0; r < rows; r += M) {
    Vec<T> sum[M][N] = {};
    const T* b = loadings;
    for (std::int64_t c = 0; c < k; c += L) {
      const T* a = strips + c * kLoneRows + r * L;
      for (const T* end = a + min_of(L, k - c); a < end; ++a, b += L, coming += step) {
        __builtin_prefetch(reinterpret_cast<const void*>(coming));
        Vec<T> v[N];
        LORASPAN_UNROLL
        for (int j = 0; j < N; ++j) v[j] = load(b + j * panel);
        LORASPAN_UNROLL
        for (int i = 0; i < M; ++i) {
          const Vec<T> w = broadcast(a[i * L]);
          LORASPAN_UNROLL
          for (int j = 0; j < N; ++j) sum[i][j] = multiply_add(w, v[j], sum[i][j]);
        }
      }
    }
    LORASPAN_UNROLL
    for (int i = 0; i < M; ++i) LORASPAN_UNROLL
    for (int j = 0; j < N; ++j) store(sums + (j * kLoneRows + r + i) * L, sum[i][j]);
  }
}

// Brings rows [first, first + kLoneRows) of out near, which are written next. Inlined, or gcc takes a call for one
// without effect.
inline __attribute__((always_inline)) void fetch_rows(const Matrix& out, std::int64_t first, std::int64_t columns) {
  const std::int64_t bytes = entry_bytes(out.dtype);
  const bool upright = out.row_stride == 1;
  const std::int64_t lines = upright ? columns : kLoneRows, length = (upright ? kLoneRows : columns) * bytes;
  const std::int64_t step = (upright ? out.col_stride : out.row_stride) * bytes;
  const std::uintptr_t start =
      reinterpret_cast<std::uintptr_t>(out.data) + static_cast<std::uintptr_t>(first * out.row_stride * bytes);
  for (std::int64_t i = 0; i < lines; ++i)
    for (std::int64_t at = 0; at < length; at += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(start + static_cast<std::uintptr_t>(i * step + at)), 1);
}

// Sums of `rows` rows from `first` on, vectors of kLoneRows rows each, to their place.
template <typename T>
inline void place_lone(const ReconstructJob& job, T* sums, std::int64_t first, std::int64_t rows, bool streams) {
  constexpr std::int64_t L = kLanes<T>;
  const T scale = static_cast<T>(job.scale);
  for (std::int64_t c = 0; c < job.p; c += L, sums += kLoneRows * L) {
    const std::int64_t columns = min_of(L, job.p - c);
    if (job.out.row_stride == 1) {
      for (std::int64_t r = 0; r < rows; r += L) transpose_square(sums + r * L);
      place(Tile<T>{sums, L * L, L, rows, columns, streams}, scale, job.out, first, c);
    } else {
      // half a line alone is slower past the caches
      const bool together = streams && columns == job.out.row_stride;
      place(Tile<T>{sums, L, L, columns, rows, together}, scale, turned(job.out), c, first);
    }
  }
}

constexpr std::int64_t kLoneVectors = 2;

// Whether reconstruct_lone is the faster for a job alone with its basis: its columns nearly fill a vector or two, of
// `lanes` entries.
inline bool is_lone(const ReconstructJob& job, std::int64_t lanes) {
  return job.loadings.data && job.p <= kLoneVectors * lanes && (job.p - 1) % lanes >= lanes / 2 &&
         job.basis.col_stride == 1 && !is_packed(job.basis.dtype);
}

// Rows [first, first + rows) of out; `loadings` are packed as panels.
template <typename T>
void reconstruct_lone(const ReconstructJob& job, const T* loadings, std::int64_t panel, std::int64_t first,
                      std::int64_t rows, bool streams) {
  constexpr std::int64_t L = kLanes<T>;
  T* strips = scratch<T>(Use::basis, kLoneRows * round_up(job.k, L));
  T* sums = scratch<T>(Use::tile, kLoneVectors * kLoneRows * L);
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(job.basis.data);
  const std::int64_t row_bytes = job.basis.row_stride * entry_bytes(job.basis.dtype);
  for (std::int64_t i = first; i < first + rows; i += kLoneRows) {
    const std::int64_t some = min_of(kLoneRows, first + rows - i);
    lone_strips(job.basis, job.k, i, some, strips);
    if (!streams) fetch_rows(job.out, i + kLoneRows, job.p);
    // those that are turned to after the next
    const std::uintptr_t coming = start + static_cast<std::uintptr_t>((i + 2 * kLoneRows) * row_bytes);
    for_vectors((job.p + L - 1) / L, [&](std::int64_t, auto vectors) {
      lone_sums<T, decltype(vectors)::value>(strips, job.k, some, loadings, panel, coming,
                                             static_cast<std::uintptr_t>(row_bytes), sums);
    });
    place_lone(job, sums, i, some, streams);
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
