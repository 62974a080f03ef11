// Columns of W^T X for rows of X that lie along memory: a block of them is packed, and while it is multiplied by all of
// W the next is brought near.
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

// The block that is packed next, in lines of memory: 2^shift of each row. Addresses are numbers because they may lie
// past what they were made from; nothing reads there.
struct ComingBlock {
  std::uintptr_t rows[kImageRows];
  int shift;

  std::int64_t lines() const { return kImageRows << shift; }
  const void* line(std::int64_t i) const {
    return reinterpret_cast<const void*>(rows[i >> shift] +
                                         static_cast<std::uintptr_t>((i & ((std::int64_t{1} << shift) - 1)) * 64));
  }
};

// Columns from c0 on of `rows` rows of X, from `at` on. Where a row begins within a line, that line is the end of what
// was packed before.
inline void locate_block(const Rows& x, Cursor at, std::int64_t rows, std::int64_t c0, ComingBlock* coming) {
  coming->shift = 0;
  while ((std::int64_t{64} << coming->shift) < kBlockColumns * entry_bytes(x.blocks[at.block].dtype)) ++coming->shift;
  for (std::int64_t row = 0; row < rows; at = {at.block + 1, 0}) {
    const Block& b = x.blocks[at.block];
    for (; at.row < b.rows && row < rows; ++at.row)
      coming->rows[row++] =
          reinterpret_cast<std::uintptr_t>(b.data) + 63 +
          static_cast<std::uintptr_t>((at.row * b.row_stride + c0 * b.col_stride) * entry_bytes(b.dtype));
  }
  for (std::int64_t i = rows; i < kImageRows; ++i) coming->rows[i] = coming->rows[i % rows];
}

// Columns [c0, c0 + n) of `rows` rows of X, from `at` on, as strips.
template <typename T>
inline void copy_block(const Rows& x, Cursor at, std::int64_t rows, std::int64_t c0, std::int64_t n, T* strips) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t done = 0, count; done < rows; done += count, at = {at.block + 1, 0}) {
    const Block& b = x.blocks[at.block];
    count = min_of(rows - done, b.rows - at.row);
    T* out = strips + done * L;
    if (b.col_stride == 1 && n % L == 0 && count > 0)
      with_type(b.data, b.dtype, [&](auto* data) {
        for (std::int64_t i = 0; i < count; ++i, out += L) {
          auto* p = data + (at.row + i) * b.row_stride + c0;
          for (std::int64_t q = 0; q < n / L; ++q) store(out + q * kStripStride<T>, load_as<T>(p + q * L));
        }
      });
    else
      pack_strips({&b, 1, x.columns}, at.row, count, c0, n, out, kStripStride<T>);
  }
}

// Adds the products of `rows` packed rows of X to kTileRows rows of W^T X, in N vectors of columns, while lines
// [first, first + count) are brought near.
template <typename T, int N>
__attribute__((noinline)) void image_tile(const T* strips, std::int64_t rows, const T* weights,
                                          const ComingBlock& coming, std::int64_t first, std::int64_t count, T* image) {
  constexpr int L = kLanes<T>, M = kTileRows;
  Vec<T> sums[M][N] = {};
  for (std::int64_t i = 0; i < rows; ++i) {
    __builtin_prefetch(coming.line(first + i * count / kImageRows), 0, 2);
    Vec<T> columns[N];
    LORASPAN_UNROLL
    for (int q = 0; q < N; ++q) columns[q] = load(strips + q * kStripStride<T> + i * L);
    LORASPAN_UNROLL
    for (int r = 0; r < M; ++r) {
      const Vec<T> w = broadcast(weights[i * M + r]);
      LORASPAN_UNROLL
      for (int q = 0; q < N; ++q) sums[r][q] = w * columns[q] + sums[r][q];
    }
  }
  LORASPAN_UNROLL
  for (int r = 0; r < M; ++r) LORASPAN_UNROLL
  for (int q = 0; q < N; ++q) {
    T* whole = image + r * kImageStride<T> + q * L;
    store(whole, load(static_cast<const T*>(whole)) + sums[r][q]);
  }
}

// Adds rows [i, i + rows), packed as `vectors` strips, to these columns of W^T X.
template <typename T>
inline void add_block(const Image& s, const T* strips, std::int64_t vectors, std::int64_t i, std::int64_t rows,
                      const T* weights, const ComingBlock& coming, T* image) {
  // in vectors of all groups
  const std::int64_t all = vectors * s.groups;
  std::int64_t done = 0;
  for_vectors(vectors, [&](std::int64_t first, auto size) {
    constexpr int N = decltype(size)::value;
    for (std::int64_t g = 0; g < s.groups; ++g, done += N) {
      const std::int64_t from = coming.lines() * done / all, to = coming.lines() * (done + N) / all;
      image_tile<T, N>(strips + first * kStripStride<T>, rows, weights + (g * s.rows + i) * kTileRows, coming, from,
                       to - from, image + g * kTileRows * kImageStride<T> + first * kLanes<T>);
    }
  });
}

// Columns [c0, c0 + n) of W^T X: row j at image + j * kImageStride.
template <typename T>
inline void form_image(const Image& s, const T* weights, std::int64_t c0, std::int64_t n, T* image) {
  constexpr std::int64_t L = kLanes<T>;
  T* strips = scratch<T>(Use::rows, kBlockColumns / L * kStripStride<T>);
  const std::int64_t entries = s.groups * kTileRows * kImageStride<T>;
  for (std::int64_t i = 0; i < entries; ++i) image[i] = 0;
  ComingBlock coming;
  Cursor at = find_row(s.x, 0), after;
  for (std::int64_t i = 0; i < s.rows; i += kImageRows, at = after) {
    const std::int64_t rows = min_of(kImageRows, s.rows - i), left = min_of(kImageRows, s.rows - i - rows);
    after = skip_rows(s.x, at, rows);
    for (std::int64_t c = 0; c < n; c += kBlockColumns) {
      const std::int64_t some = min_of(kBlockColumns, n - c), next = c + kBlockColumns;
      copy_block(s.x, at, rows, c0 + c, some, strips);
      if (next < n || left == 0)
        locate_block(s.x, at, rows, c0 + next, &coming);
      else
        locate_block(s.x, after, left, c0, &coming);
      add_block(s, strips, (some + L - 1) / L, i, rows, weights, coming, image + c);
    }
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
