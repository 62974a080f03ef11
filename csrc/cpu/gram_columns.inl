// gram of few rows whose columns lie along memory, in float64: a column is widened where it lies, and its products with
// itself are added to those of the columns before. Nothing is turned.
namespace loraspan {
namespace LORASPAN_ISA {

// Up to so many rows, their sums are two tiles at most of the widest registers.
constexpr std::int64_t kColumnRows = 16;
constexpr std::int64_t kColumnUnit = kTileRows > kLanes<double> ? kTileRows : kLanes<double>;

template <typename T, typename X>
inline bool has_few_rows_in_columns(const X& x) {
  if (sizeof(T) != 8 || x.count != 1) return false;
  const Block& b = x.blocks[0];
  return is_column_major(b) && b.rows <= kColumnRows && b.rows % kColumnUnit == 0;
}

// The lower triangle of the Gram of columns [first, last), [rows, rows]; some of what is above it is written too.
template <typename S>
inline void column_products(const S* data, std::int64_t col_stride, std::int64_t rows, std::int64_t first,
                            std::int64_t last, double* sums) {
  constexpr int L = kLanes<double>, M = kTileRows;
  double* some = scratch<double>(Use::packed, kFlush * rows);
  // what is widened next is brought near meanwhile; a number, because it may lie past the last column
  const std::uintptr_t start = reinterpret_cast<std::uintptr_t>(data);
  const std::int64_t step = col_stride * static_cast<std::int64_t>(sizeof(S));
  for (std::int64_t c = first; c < last; c += kFlush) {
    const std::int64_t n = min_of(last - c, kFlush);
    for (std::int64_t k = 0; k < n; ++k) {
      __builtin_prefetch(reinterpret_cast<const void*>(start + static_cast<std::uintptr_t>((c + k + kFlush) * step)));
      for (std::int64_t i = 0; i < rows; i += L)
        store(some + k * rows + i, load_as<double>(data + (c + k) * col_stride + i));
    }
    for (std::int64_t i = 0; i < rows; i += M)
      for_vectors(round_up(i + M, L) / L, [&](std::int64_t at, auto size) {
        constexpr int N = decltype(size)::value;
        product_tile<M, N>(some + i, 1, rows, some + at * L, rows, n, sums + i * rows + at * L, rows, L, c == first);
      });
  }
}

// Does what dot_slabs does, and leaves the sums where that does.
template <typename X>
inline void column_slabs(const X& x, std::int64_t width, std::int64_t first, std::int64_t last, double* tiles) {
  const Block& b = x.blocks[0];
  const std::int64_t rows = b.rows;
  alignas(64) double sums[kColumnRows * kColumnRows];
  for (std::int64_t slab = first; slab < last; ++slab) {
    const std::int64_t begin = slab * width, end = min_of(x.columns, begin + width);
    for (double& sum : sums) sum = 0;
    with_type(b.data, b.dtype, [&](const auto* data) { column_products(data, b.col_stride, rows, begin, end, sums); });
    for (std::int64_t i = 0; i < rows; i += kDotRows)
      for (std::int64_t j = i; j < rows; j += kDotRows, tiles += kDotTile)
        for (std::int64_t r = 0; r < kDotRows; ++r)
          for (std::int64_t q = 0; q < kDotRows; ++q) tiles[dot_place(r, q)] = sums[(j + q) * rows + i + r];
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
