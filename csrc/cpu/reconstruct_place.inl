// Writing a tile of results to its place: scaled, rounded, and turned if the place asks for it.
namespace loraspan {
namespace LORASPAN_ISA {

template <typename P>
struct Mutable;
template <typename S>
struct Mutable<const S*> {
  using type = S;
};

// Columns of a piece that are computed before they are written.
constexpr std::int64_t kPlaceColumns = 16;

// A tile whose columns are vectors: rows [j L, j L + L) of column c at data + j * vector_step + c * column_step.
template <typename T>
struct Tile {
  const T* data;
  std::int64_t vector_step;
  std::int64_t column_step;
  std::int64_t rows;
  std::int64_t columns;
  bool streams = false;  // past the caches
};

// Columns that are contiguous in memory.
template <typename T, typename S>
inline void place_columns(const Tile<T>& tile, T scale, S* out, std::int64_t col_stride) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t c = 0; c < tile.columns; ++c)
    for (std::int64_t i = 0; i < tile.rows; i += L)
      store_first<T>(out + c * col_stride + i,
                     load(tile.data + i / L * tile.vector_step + c * tile.column_step) * scale, tile.rows - i,
                     tile.streams);
}

// Rows that are contiguous in memory: squares of L x L entries are transposed.
template <typename T, typename S>
inline void place_rows(const Tile<T>& tile, T scale, S* out, std::int64_t row_stride) {
  constexpr std::int64_t L = kLanes<T>;
  // half a line alone is slower past the caches: rows follow each other there
  const bool streams = tile.streams && tile.columns == row_stride;
  for (std::int64_t i = 0; i < tile.rows; i += L)
    for (std::int64_t c = 0; c < tile.columns; c += L) {
      const T* from = tile.data + i / L * tile.vector_step + c * tile.column_step;
      const std::int64_t columns = min_of(tile.columns - c, L), rows = min_of(tile.rows - i, L);
      Vec<T> v[L];
#pragma GCC unroll 16
      for (int lane = 0; lane < L; ++lane)
        v[lane] = lane < columns ? load(from + lane * tile.column_step) * scale : Vec<T>{};
      transpose(v);
      S* to = out + i * row_stride + c;
      for (std::int64_t row = 0; row < rows; ++row) store_first<T>(to + row * row_stride, v[row], columns, streams);
    }
}

// Any strides.
template <typename T, typename S>
inline void place_entries(const Tile<T>& tile, T scale, S* out, std::int64_t row_stride, std::int64_t col_stride) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t c = 0; c < tile.columns; ++c)
    for (std::int64_t i = 0; i < tile.rows; ++i)
      round_entry(out + i * row_stride + c * col_stride,
                  tile.data[i / L * tile.vector_step + c * tile.column_step + i % L] * scale);
}

template <typename T>
inline void place(const Tile<T>& tile, T scale, const Matrix& out, std::int64_t row, std::int64_t column) {
  with_type(out.data, out.dtype, [&](auto* data) {
    using S = typename Mutable<decltype(data)>::type;
    S* to = const_cast<S*>(data) + row * out.row_stride + column * out.col_stride;
    if (out.row_stride == 1)
      place_columns(tile, scale, to, out.col_stride);
    else if (out.col_stride == 1)
      place_rows(tile, scale, to, out.row_stride);
    else
      place_entries(tile, scale, to, out.row_stride, out.col_stride);
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
