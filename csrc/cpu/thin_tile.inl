// Thin products: a tile of rows times the vectors of a matrix that is only a few vectors wide.
namespace loraspan {
namespace LORASPAN_ISA {

// Columns between which a tile asks for memory.
constexpr std::int64_t kComingColumns = 16;

// Memory to bring near while tiles are at work, some lines at a time. Addresses are numbers because they may lie past
// what they were made from; nothing reads there.
struct Coming {
  std::uintptr_t at, end;
  std::uintptr_t step;  // bytes to ask for at a time

  void some() {
    const std::uintptr_t stop = end - at < step ? end : at + step;
    for (; at < stop; at += 64) __builtin_prefetch(reinterpret_cast<const void*>(at));
  }
};

// Rows [first, last) of a basis, to be near within so many columns of tiles; or nothing, if they do not lie together.
inline Coming coming_rows(const Matrix& basis, std::int64_t first, std::int64_t last, std::int64_t columns) {
  if (is_packed(basis.dtype) || basis.col_stride != 1 || first >= last) return {0, 0, 0};
  const std::int64_t row = basis.row_stride * entry_bytes(basis.dtype), times = max_of(1, columns / kComingColumns);
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(basis.data);
  const std::int64_t lines = ((last - first) * row + 63) / 64;
  return {start + static_cast<std::uintptr_t>(first * row), start + static_cast<std::uintptr_t>(last * row),
          static_cast<std::uintptr_t>((lines + times - 1) / times * 64)};
}

// How many tiles rows and vectors make.
inline std::int64_t tiles_of(std::int64_t rows, std::int64_t vectors) {
  return (rows + kTileRows - 1) / kTileRows * ((vectors + kTileVectors - 1) / kTileVectors);
}

// out[i * out_step + j * L] (+)= sum over c in [0, n) of rows[i][c] * vector j at b + c * step + j * vector_step, for M
// rows i and N vectors j. A row's sum is the same whatever M is.
template <typename T, int M, int N>
__attribute__((noinline)) void thin_tile(const T* const* rows, const T* b, std::int64_t step, std::int64_t vector_step,
                                         std::int64_t n, bool add, T* out, std::int64_t out_step, Coming* coming) {
  constexpr int L = kLanes<T>;
  const T* x[M];
  LORASPAN_UNROLL
  for (int i = 0; i < M; ++i) x[i] = rows[i];
  Vec<T> sums[M][N] = {};
  for (std::int64_t c0 = 0; c0 < n; c0 += kComingColumns) {
    coming->some();
    const std::int64_t end = min_of(n, c0 + kComingColumns);
    for (std::int64_t c = c0; c < end; ++c) {
      Vec<T> v[N];
      LORASPAN_UNROLL
      for (int j = 0; j < N; ++j) v[j] = load(b + c * step + j * vector_step);
      LORASPAN_UNROLL
      for (int i = 0; i < M; ++i) {
        const Vec<T> w = broadcast(x[i][c]);
        LORASPAN_UNROLL
        for (int j = 0; j < N; ++j) sums[i][j] = w * v[j] + sums[i][j];
      }
    }
  }
  // to aligned memory first: stored in two ways, the sums would live in memory during the loop as well
  alignas(64) T done[M * N * L];
  LORASPAN_UNROLL
  for (int i = 0; i < M; ++i) LORASPAN_UNROLL
  for (int j = 0; j < N; ++j) store(done + (i * N + j) * L, sums[i][j]);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < N; ++j) {
      T* p = out + i * out_step + j * L;
      const Vec<T> sum = load(static_cast<const T*>(done) + (i * N + j) * L);
      store(p, add ? load(static_cast<const T*>(p)) + sum : sum);
    }
}

// A full tile of rows, or a lone one.
template <typename T, int N>
inline void thin_rows_of(std::int64_t real, const T* const* rows, const T* b, std::int64_t step,
                         std::int64_t vector_step, std::int64_t n, bool add, T* out, std::int64_t out_step,
                         Coming* coming) {
  if (real == 1)
    thin_tile<T, 1, N>(rows, b, step, vector_step, n, add, out, out_step, coming);
  else
    thin_tile<T, kTileRows, N>(rows, b, step, vector_step, n, add, out, out_step, coming);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
