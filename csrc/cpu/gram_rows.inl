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
// sums[i * kDotVectors + j]. Rows lie kRow apart, their vectors kStep.
template <typename T, std::int64_t kRow, std::int64_t kStep>
__attribute__((noinline)) void dot_part(const T* a, const T* b, std::int64_t steps, double* sums) {
  constexpr int L = kLanes<T>, M = kDotRows, N = kDotVectors;
  Sum<T> sum[M * N] = {};
  for (std::int64_t k = 0; k < steps; ++k, a += kStep, b += kStep) {
    Vec<T> v[N];
    LORASPAN_UNROLL
    for (int j = 0; j < N; ++j) v[j] = load(b + j * kRow);
    LORASPAN_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec<T> w = load(a + i * kRow);
      LORASPAN_UNROLL
      for (int j = 0; j < N; ++j) sum[i * N + j] = multiply_add(w, v[j], sum[i * N + j]);
    }
  }
  LORASPAN_UNROLL
  for (int i = 0; i < M * N; i += L) {
    Sum<T> some[L];
    LORASPAN_UNROLL
    for (int j = 0; j < L; ++j) some[j] = sum[i + j];
    flush<true>(sums + i, add_across(some));
  }
}

// The same with kDotRows rows from b on: one tile.
template <typename T, std::int64_t kRow, std::int64_t kStep>
inline void dot_tile(const T* a, const T* b, std::int64_t steps, double* tile) {
  for (int part = 0; part < kDotRows; part += kDotVectors)
    dot_part<T, kRow, kStep>(a, b + part * kRow, steps, tile + part * kDotRows);
}

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

// So many rows are on their way at once: where rows lie a power of two apart, more would share the ways of a cache.
constexpr std::int64_t kDotAhead = 16;

// Columns [first, last) of all rows, brought near a few lines at a time, row after row.
struct Fetch {
  Rows x;
  std::int64_t first, last;
  Cursor at = {0, 0};
  std::int64_t line = 0;
  std::int64_t rows = 0;  // that are on their way

  // So many lines, but no rows from `before` on.
  void some(std::int64_t lines, std::int64_t before) {
    while (lines > 0 && at.block < x.count && rows < before) {
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

// The sums of all tiles of so many rows.
inline std::int64_t dot_sums(std::int64_t rows) {
  const std::int64_t groups = (rows + kDotRows - 1) / kDotRows;
  return groups * (groups + 1) / 2 * kDotTile;
}

// The tiles of slabs [first, last) of `width` columns each, row by row of the upper triangle: when a group of rows had
// its turn nobody reads its part of a chunk any more, and that of the next chunk, which was fetched meanwhile, takes
// its place. Rows lie pages apart, and no hardware prefetcher follows them.
template <typename T, typename X>
inline void dot_slabs(const X& x, std::int64_t rows, std::int64_t width, std::int64_t first, std::int64_t last,
                      double* tiles) {
  constexpr std::int64_t L = kLanes<T>;
  const std::int64_t groups = (rows + kDotRows - 1) / kDotRows, sums = dot_sums(rows);
  T* panels = scratch<T>(Use::packed, dot_row<T>(round_up(rows, kDotPanel)));
  for (std::int64_t i = 0; i < (last - first) * sums; ++i) tiles[i] = 0;
  // rows that the last group lacks
  for (std::int64_t i = rows; i < groups * kDotRows; ++i)
    for (std::int64_t k = 0; k < kDotColumns<T> / L; ++k) store(panels + dot_row<T>(i) + k * kDotStride<T>, Vec<T>{});
  // columns that lie along memory are turned a square of vectors at a time
  const bool along = has_rows_along_memory(x);
  const std::int64_t unit = along ? kDotRows : kDotPanel;
  const std::int64_t begin = first * width, end = min_of(x.columns, last * width);
  const auto chunk_end = [&](std::int64_t c) {
    return min_of(min_of(end, (c / width + 1) * width), c + kDotColumns<T>);
  };
  const auto pack = [&](std::int64_t i, std::int64_t c) {
    const std::int64_t start = i / unit * unit;
    if (i + kDotRows < min_of(start + unit, rows) || c == end) return;
    pack_strips(x, start, min_of(unit, rows - start), c, chunk_end(c) - c, panels + dot_row<T>(start), kDotStride<T>);
  };
  const auto fetch = [&](std::int64_t c) {
    return Fetch{x, c * kEntries<T>, (along ? chunk_end(c) : c) * kEntries<T>};
  };
  // twice the share of a tile: the last groups have few tiles to be fetched under
  const std::int64_t chunk_lines = rows * kDotColumns<T> * static_cast<std::int64_t>(sizeof(T)) / 64;
  const std::int64_t lines = 2 * chunk_lines * kDotTile / max_of(1, dot_sums(rows)) + 1;
  Fetch near = fetch(begin);
  for (std::int64_t i = 0; i < rows && begin < end; i += kDotRows) {
    near.some(chunk_lines, i + kDotAhead);
    pack(i, begin);
  }
  for (std::int64_t c = begin, after; c < end; c = after) {
    after = chunk_end(c);
    const std::int64_t steps = (after - c + L - 1) / L;
    double* tile = tiles + (c / width - first) * sums;
    near = fetch(after);
    for (std::int64_t i = 0; i < rows; i += kDotRows) {
      for (std::int64_t j = i; j < rows; j += kDotRows, tile += kDotTile) {
        near.some(lines, i + kDotAhead);
        dot_tile<T, L, kDotStride<T>>(panels + dot_row<T>(i), panels + dot_row<T>(j), steps, tile);
      }
      pack(i, after);
    }
  }
}

// Where a tile has its entry (r, c).
inline std::int64_t dot_place(std::int64_t r, std::int64_t c) {
  return c / kDotVectors * kDotVectors * kDotRows + r * kDotVectors + c % kDotVectors;
}

// Adds the tiles of all slabs and writes a share of the rows, and the columns that are their mirror image.
inline void finish_dots(std::int64_t rows, const SlabSums& sums, std::int64_t part, std::int64_t parts, double* out) {
  constexpr std::int64_t L = kLanes<double>;
  const std::int64_t groups = (rows + kDotRows - 1) / kDotRows;
  for (std::int64_t i = groups * part / parts; i < groups * (part + 1) / parts; ++i)
    for (std::int64_t j = i; j < groups; ++j) {
      const std::int64_t tile = (i * groups - i * (i - 1) / 2 + j - i) * kDotTile;
      alignas(64) double total[kDotTile];
      for (std::int64_t e = 0; e < kDotTile; e += L) store(total + e, sums.total(tile + e));
      for (std::int64_t r = 0; r < min_of(kDotRows, rows - i * kDotRows); ++r)
        for (std::int64_t c = 0; c < min_of(kDotRows, rows - j * kDotRows); ++c) {
          const std::int64_t row = i * kDotRows + r, column = j * kDotRows + c;
          out[row * rows + column] = out[column * rows + row] = total[dot_place(r, c)];
        }
    }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
