// Columns of W^T X for rows of X that lie along memory: they are multiplied by entries of W as they are loaded, and
// where they can be loaded as vectors nothing is packed.
namespace loraspan {
namespace LORASPAN_ISA {

// W in groups of kTileRows columns: entry (i, g * kTileRows + r) at out[(g * rows + i) * kTileRows + r].
template <typename T>
inline void pack_weight_groups(const Image& s, T* out) {
  for (std::int64_t i = 0; i < s.rows; ++i)
    for (std::int64_t g = 0; g < s.groups; ++g) {
      const double* w = s.w + i * s.k + g * kTileRows;
      const std::int64_t n = min_of(kTileRows, s.k - g * kTileRows);
      T* to = out + (g * s.rows + i) * kTileRows;
      if (n == kTileRows)
        for (int r = 0; r < kTileRows; ++r) to[r] = static_cast<T>(w[r]);
      else
        for (int r = 0; r < kTileRows; ++r) to[r] = r < n ? static_cast<T>(w[r]) : T{0};
    }
}

// Adds the products of `rows` rows of X to kTileRows rows of W^T X, in N vectors of columns. Vector q of row i begins
// at x + i * row_step + q * vector_step; `ahead` entries on lies what is wanted next.
template <typename T, int N, typename S>
__attribute__((noinline)) void image_tile(const S* x, std::int64_t row_step, std::int64_t vector_step,
                                          std::int64_t ahead, std::int64_t rows, const T* weights, Run<T> image) {
  constexpr int L = kLanes<T>, M = kTileRows;
  Vec<T> sums[M][N];
  LORASPAN_UNROLL
  for (int r = 0; r < M; ++r) LORASPAN_UNROLL
  for (int q = 0; q < N; ++q) sums[r][q] = image.begin(r * kImageStride<T> + q * L);
  for (std::int64_t i = 0; i < rows; ++i) {
    const S* row = x + i * row_step;
    Vec<T> columns[N];
    LORASPAN_UNROLL
    for (int q = 0; q < N; ++q) {
      columns[q] = load_as<T>(row + q * vector_step);
      __builtin_prefetch(row + q * vector_step + ahead);
    }
    LORASPAN_UNROLL
    for (int r = 0; r < M; ++r) {
      const Vec<T> w = broadcast(weights[i * M + r]);
      LORASPAN_UNROLL
      for (int q = 0; q < N; ++q) sums[r][q] = w * columns[q] + sums[r][q];
    }
  }
  LORASPAN_UNROLL
  for (int r = 0; r < M; ++r) LORASPAN_UNROLL
  for (int q = 0; q < N; ++q) image.end(r * kImageStride<T> + q * L, sums[r][q]);
}

// Rows [i0, i0 + rows) of X, which begin at x, in `vectors` vectors of columns.
template <typename T, typename S>
inline void image_rows(const Image& s, const S* x, std::int64_t row_step, std::int64_t vector_step, std::int64_t i0,
                       std::int64_t rows, std::int64_t vectors, const T* weights, Run<T> image) {
  constexpr int L = kLanes<T>;
  for_vectors(vectors, [&](std::int64_t first, auto size) {
    constexpr int N = decltype(size)::value;
    // the tile after this one, of the same rows
    const std::int64_t ahead = vector_step == L ? N * L : 0;
    for (std::int64_t g = 0; g < s.groups; ++g)
      image_tile<T, N>(x + first * vector_step, row_step, vector_step, ahead, rows,
                       weights + (g * s.rows + i0) * kTileRows,
                       image.from(g * kTileRows * kImageStride<T> + first * L));
  });
}

// Columns [c0, c0 + n) of W^T X: row j at image + j * kImageStride.
template <typename T>
inline void form_image(const Image& s, const T* weights, std::int64_t c0, std::int64_t n, T* image) {
  constexpr int L = kLanes<T>;
  constexpr std::int64_t kStride = kStreams * L + L;
  T* strips = scratch<T>(Use::rows, kImageColumns / L * kStride);
  const std::int64_t entries = s.groups * kTileRows * kImageStride<T>;
  const Run<T> sums = {scratch<T>(Use::part, entries), image, true, true};
  for (std::int64_t i = 0; i < entries; ++i) image[i] = 0;
  std::int64_t at = 0;
  for (std::int64_t block = 0; block < s.x.count; ++block) {
    const Block& b = s.x.blocks[block];
    for (std::int64_t i = 0, rows; i < b.rows; i += rows, at += rows) {
      rows = min_of(kStreams - at % kStreams, b.rows - i);
      const Run<T> run = sums.of(at, rows, s.rows);
      if (b.col_stride == 1 && n % L == 0) {
        with_type(b.data, b.dtype, [&](auto* p) {
          image_rows<T>(s, p + i * b.row_stride + c0, b.row_stride, L, at, rows, n / L, weights, run);
        });
      } else {
        pack_strips(s.x, at, rows, c0, n, strips, kStride);
        image_rows<T>(s, static_cast<const T*>(strips), L, kStride, at, rows, (n + L - 1) / L, weights, run);
      }
    }
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
