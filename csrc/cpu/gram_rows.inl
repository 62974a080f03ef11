// gram of few rows. Lanes are columns: rows that lie along memory are copied and not transposed, and a tile is of rows
// times rows, its sums added across their lanes when a chunk of columns is done.
namespace loraspan {
namespace LORASPAN_ISA {

// A tile is of so many rows,
constexpr int kDotRows = 4;
// and of so many others, whose sums fit the registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDotVectors = 4;
#else
constexpr int kDotVectors = 2;
#endif
constexpr std::int64_t kDotTile = kDotRows * kDotRows;
// Columns of a chunk. A float32 sum of a lane is of at most 64 products, to which the other lanes' are added.
template <typename T>
constexpr std::int64_t kDotColumns = sizeof(T) == 8 || kLanes<T> < 8 ? 256 : 512;

// Lane i of the result is the sum of the lanes of v[i].
template <typename V, int N>
inline __attribute__((always_inline)) V add_across(V (&v)[N]) {
  if constexpr (N > 1) {
    V half[N / 2];
    LORASPAN_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      swap_blocks<N / 2>(v[i], v[i + N / 2], typename CountTo<sizeof(V) / sizeof(v[0][0])>::type{});
      half[i] = v[i] + v[i + N / 2];
    }
    return add_across(half);
  } else {
    return v[0];
  }
}

// Rows are packed in panels: vector v of row r at panel[v * kDotStride + r * L], which spreads over all sets of a
// cache.
constexpr std::int64_t kDotPanel = 16;
template <typename T>
constexpr std::int64_t kDotStride = (kDotPanel + kDotRows) * kLanes<T>;

// Adds the products of kDotRows rows from a on with kDotVectors rows from b on over `steps` vectors: entry (i, j) to
// sums[i * kDotVectors + j].
template <typename T>
__attribute__((noinline)) void dot_tile(const T* a, const T* b, std::int64_t steps, double* sums) {
  constexpr int L = kLanes<T>, M = kDotRows, N = kDotVectors;
  Vec<T> sum[M * N] = {};
  for (std::int64_t k = 0; k < steps; ++k, a += kDotStride<T>, b += kDotStride<T>) {
    Vec<T> v[N];
    LORASPAN_UNROLL
    for (int j = 0; j < N; ++j) v[j] = load(b + j * L);
    LORASPAN_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec<T> w = load(a + i * L);
      LORASPAN_UNROLL
      for (int j = 0; j < N; ++j) sum[i * N + j] = w * v[j] + sum[i * N + j];
    }
  }
  LORASPAN_UNROLL
  for (int i = 0; i < M * N; i += L) {
    Vec<T> some[L];
    LORASPAN_UNROLL
    for (int j = 0; j < L; ++j) some[j] = sum[i + j];
    flush<true>(sums + i, add_across(some));
  }
}

// Columns [first, last) of all rows, brought near a few lines at a time, row after row.
struct Fetch {
  Rows x;
  std::int64_t first, last;
  Cursor at = {0, 0};
  std::int64_t line = 0;
  std::int64_t rows = 0;  // that are on their way

  void some(std::int64_t lines) {
    while (lines > 0 && at.block < x.count) {
      const Block& b = x.blocks[at.block];
      if (at.row >= b.rows) {
        at = {at.block + 1, 0};
        continue;
      }
      const std::int64_t size = entry_bytes(b.dtype), all = ((last - first) * size + 63) / 64;
      const char* p = static_cast<const char*>(b.data) + (at.row * b.row_stride + first) * size;
      for (; lines > 0 && line < all; --lines, ++line) __builtin_prefetch(p + line * 64);
      if (line < all) return;
      line = 0;
      ++at.row;
      ++rows;
    }
  }
};

// Row i of panels, and how many entries these take.
template <typename T>
constexpr std::int64_t dot_row(std::int64_t i) {
  return i / kDotPanel * (kDotColumns<T> / kLanes<T> * kDotStride<T>)+i % kDotPanel * kLanes<T>;
}

inline bool has_rows_along_memory(const Rows& x) {
  for (std::int64_t b = 0; b < x.count; ++b)
    if (x.blocks[b].col_stride != 1) return false;
  return true;
}

// The tiles of a slab of columns [begin, end), row by row of the lower triangle. While a chunk is multiplied the next
// one is fetched and, when it is there, packed: rows lie pages apart, and no hardware prefetcher follows them.
template <typename T>
inline void dot_tiles(const Rows& x, std::int64_t rows, std::int64_t begin, std::int64_t end, double* tiles) {
  constexpr std::int64_t L = kLanes<T>;
  const std::int64_t groups = (rows + kDotRows - 1) / kDotRows, count = groups * (groups + 1) / 2;
  const std::int64_t lines = rows * kDotColumns<T> * static_cast<std::int64_t>(sizeof(T)) / 64 / max_of(1, count) + 1;
  const std::int64_t entries = dot_row<T>(round_up(rows, kDotPanel));
  T *here = scratch<T>(Use::packed, 2 * entries), *next = here + entries;
  for (std::int64_t i = 0; i < count * kDotTile; ++i) tiles[i] = 0;
  // rows that the last group lacks
  for (std::int64_t i = rows; i < groups * kDotRows; ++i)
    for (std::int64_t v = 0; v < 2 * entries; v += entries)
      for (std::int64_t k = 0; k < kDotColumns<T> / L; ++k)
        store(here + v + dot_row<T>(i) + k * kDotStride<T>, Vec<T>{});
  // columns that lie along memory are turned a square of vectors at a time
  const std::int64_t unit = has_rows_along_memory(x) ? kDotRows : kDotPanel;
  const auto pack = [&](std::int64_t i, std::int64_t c, T* to) {
    pack_strips(x, i, min_of(unit, rows - i), c, min_of(end - c, kDotColumns<T>), to + dot_row<T>(i), kDotStride<T>);
  };
  for (std::int64_t i = 0; i < rows && begin < end; i += unit) pack(i, begin, here);
  for (std::int64_t c = begin; c < end; c += kDotColumns<T>) {
    const std::int64_t after = c + kDotColumns<T>, steps = (min_of(end, after) - c + L - 1) / L;
    // beyond the slab too: what follows is likely to be read next
    Fetch fetch{x, after, unit == kDotRows ? max_of(after, min_of(x.columns, after + kDotColumns<T>)) : after};
    std::int64_t ready = after < end ? 0 : rows;
    double* tile = tiles;
    for (std::int64_t i = 0; i < groups; ++i)
      for (std::int64_t j = 0; j <= i; ++j, tile += kDotTile) {
        fetch.some(lines);
        const T *a = here + dot_row<T>(i * kDotRows), *b = here + dot_row<T>(j * kDotRows);
        for (std::int64_t part = 0; part < kDotRows; part += kDotVectors)
          dot_tile(a, b + part * L, steps, tile + part * kDotRows);
        if (ready < rows && fetch.rows >= ready + 2 * unit) pack(ready, after, next), ready += unit;
      }
    for (; ready < rows; ready += unit) pack(ready, after, next);
    T* packed = here;
    here = next;
    next = packed;
  }
}

// Sums of the columns [begin, end): entry (i, j), j <= i, at sums + i * rows + j.
template <typename T>
inline void dot_slab(const Rows& x, std::int64_t rows, std::int64_t begin, std::int64_t end, double* sums) {
  const std::int64_t groups = (rows + kDotRows - 1) / kDotRows;
  double* tiles = scratch<double>(Use::rows, groups * (groups + 1) / 2 * kDotTile);
  dot_tiles<T>(x, rows, begin, end, tiles);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j <= i; ++j) {
      const std::int64_t group = i / kDotRows, row = i % kDotRows, column = j % kDotRows;
      const double* tile = tiles + (group * (group + 1) / 2 + j / kDotRows) * kDotTile;
      sums[i * rows + j] =
          tile[column / kDotVectors * kDotVectors * kDotRows + row * kDotVectors + column % kDotVectors];
    }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
