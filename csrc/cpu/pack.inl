// Packing: a chunk of columns of X, whatever its blocks are like, as vectors of one element type T.
//
// Panels: lanes are rows.     Row i, column c of the chunk at panels[(i / L) * stride + c * L + i % L].
// Strips: lanes are columns.  Row i, column c of the chunk at strips[(c / L) * stride + i * L + c % L].
// L = kLanes<T>. Lanes past the last row or column hold zeros.
namespace loraspan {
namespace LORASPAN_ISA {

// Columns that are read of one row before the next row is turned to.
constexpr std::int64_t kLineColumns = 128;

// A place in X: row `row` of block `block`.
struct Cursor {
  std::int64_t block;
  std::int64_t row;
};

inline Cursor find_row(const Rows& x, std::int64_t i) {
  std::int64_t b = 0;
  while (b < x.count && i >= x.blocks[b].rows) i -= x.blocks[b++].rows;
  return {b, i};
}

// p[i * stride] for i in [0, n), as T, to out; zeros up to a whole vector.
template <typename T, typename S>
inline void read_line(const S* p, std::int64_t stride, std::int64_t n, T* out) {
  constexpr int L = kLanes<T>;
  const std::int64_t whole = n / L * L;
  if (stride == 1) {
    for (std::int64_t i = 0; i < whole; i += L) {
      // rows lie pages apart: no hardware prefetcher follows them
      __builtin_prefetch(p + i + kLineColumns);
      store(out + i, load_as<T>(p + i));
    }
    if (whole < n) store(out + whole, load_first<T>(p + whole, n - whole));
    return;
  }
  for (std::int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(widen_entry(p[i * stride]));
  for (std::int64_t i = n; i < round_up(n, L); ++i) out[i] = 0;
}

inline bool is_column_major(const Block& b) { return b.row_stride == 1 && b.col_stride != 1; }

// Rows [first, first + count) of a column-major block to lanes [lane, lane + count) of a panel.
template <typename T, typename S>
inline void fill_lanes(const S* p, std::int64_t col_stride, std::int64_t lane, std::int64_t count, std::int64_t n,
                       T* panel) {
  constexpr int L = kLanes<T>;
  if (count == L) {
    // columns that follow each other: hardware stops fetching ahead where a page ends
    for (std::int64_t c = 0; c < n; ++c) {
      __builtin_prefetch(p + (c + kLineColumns) * col_stride);
      store(panel + c * L, load_as<T>(p + c * col_stride));
    }
    return;
  }
  for (std::int64_t c = 0; c < n; ++c) {
    const Vec<T> entries = load_first<T>(p + c * col_stride, count);
    __builtin_memcpy(panel + c * L + lane, &entries, static_cast<size_t>(count) * sizeof(T));
  }
}

template <typename T>
inline void transpose_lines(const T* lines, std::int64_t n, T* panel) {
  constexpr int L = kLanes<T>;
  Vec<T> v[L];
  for (std::int64_t c = 0; c < n; c += L) {
    LORASPAN_UNROLL
    for (int i = 0; i < L; ++i) v[i] = load(lines + i * kLineColumns + c);
    transpose(v);
    if (n - c < L) {
      for (std::int64_t i = 0; i < n - c; ++i) store(panel + (c + i) * L, v[i]);
      return;
    }
    LORASPAN_UNROLL
    for (int i = 0; i < L; ++i) store(panel + (c + i) * L, v[i]);
  }
}

// Columns [c0, c0 + n) of L rows of one block that lie along memory, to one panel; n is whole vectors.
template <typename T, typename S>
inline void transpose_rows(const S* p, std::int64_t row_stride, std::int64_t n, T* panel) {
  constexpr int L = kLanes<T>;
  // rows lie pages apart: no hardware prefetcher follows them. Short rows follow each other: the panels after this one.
  // Who takes a part of long rows knows what it takes next.
  const std::int64_t page = 4096 / static_cast<std::int64_t>(sizeof(S));
  const std::int64_t ahead = n > kLineColumns ? kLineColumns : max_of(L, page / max_of(1, n)) * row_stride;
  const bool fetches = n > kLineColumns || row_stride <= kLineColumns;
  for (std::int64_t c = 0; c < n; c += L) {
    Vec<T> v[L];
    LORASPAN_UNROLL
    for (int i = 0; i < L; ++i) v[i] = load_as<T>(p + i * row_stride + c);
    for (int i = 0; fetches && i < L; ++i) __builtin_prefetch(p + i * row_stride + c + ahead);
    transpose(v);
    LORASPAN_UNROLL
    for (int i = 0; i < L; ++i) store(panel + (c + i) * L, v[i]);
  }
}

// Columns [c0, c0 + n) of the L rows from `at` on, to one panel. `rows` of them exist.
template <typename T>
inline void pack_panel(const Rows& x, Cursor at, std::int64_t rows, std::int64_t c0, std::int64_t n, T* panel) {
  constexpr int L = kLanes<T>;
  if (rows == L && n % L == 0 && x.blocks[at.block].rows - at.row >= L && x.blocks[at.block].col_stride == 1) {
    const Block& b = x.blocks[at.block];
    with_type(b.data, b.dtype,
              [&](auto* p) { transpose_rows(p + at.row * b.row_stride + c0, b.row_stride, n, panel); });
    return;
  }
  alignas(64) T lines[L * kLineColumns];
  for (std::int64_t start = 0; start < n; start += kLineColumns) {
    const std::int64_t width = min_of(n - start, kLineColumns);
    bool has_lines = rows < L;
    Cursor cursor = at;
    for (std::int64_t lane = 0; lane < rows;) {
      const Block& b = x.blocks[cursor.block];
      const std::int64_t count = min_of(rows - lane, b.rows - cursor.row);
      if (!is_column_major(b) || count < L) has_lines = true;
      for (std::int64_t i = 0; i < count && !is_column_major(b); ++i)
        with_type(b.data, b.dtype, [&](auto* p) {
          read_line(p + (cursor.row + i) * b.row_stride + (c0 + start) * b.col_stride, b.col_stride, width,
                    lines + (lane + i) * kLineColumns);
        });
      lane += count;
      cursor = {cursor.block + 1, 0};
    }
    for (std::int64_t i = rows * kLineColumns; i < L * kLineColumns; ++i) lines[i] = 0;
    if (has_lines) transpose_lines(lines, width, panel + start * L);
    cursor = at;
    for (std::int64_t lane = 0; lane < rows;) {
      const Block& b = x.blocks[cursor.block];
      const std::int64_t count = min_of(rows - lane, b.rows - cursor.row);
      if (is_column_major(b) && count > 0)
        with_type(b.data, b.dtype, [&](auto* p) {
          fill_lanes(p + cursor.row + (c0 + start) * b.col_stride, b.col_stride, lane, count, width, panel + start * L);
        });
      lane += count;
      cursor = {cursor.block + 1, 0};
    }
  }
}

// Panels [first, last) of columns [c0, c0 + n) of X, which has `rows` rows; `panels` is where panel 0 is or would be.
// Panels may lie past the last row: they are zero.
template <typename T>
inline void pack_panels(const Rows& x, std::int64_t rows, std::int64_t first, std::int64_t last, std::int64_t c0,
                        std::int64_t n, T* panels, std::int64_t stride) {
  constexpr int L = kLanes<T>;
  Cursor at = find_row(x, first * L);
  for (std::int64_t p = first; p < last; ++p) {
    pack_panel(x, at, max_of(0, min_of(rows - p * L, L)), c0, n, panels + p * stride);
    at.row += L;
    while (at.block < x.count && at.row >= x.blocks[at.block].rows) at.row -= x.blocks[at.block++].rows;
  }
}

// Column-major rows of one block to strips: L x L entries are transposed at a time.
template <typename T, typename S>
inline void strips_from_columns(const S* p, std::int64_t col_stride, std::int64_t rows, std::int64_t n, T* strips,
                                std::int64_t stride) {
  constexpr int L = kLanes<T>;
  Vec<T> v[L];
  for (std::int64_t c = 0; c < n; c += L)
    for (std::int64_t i = 0; i < rows; i += L) {
      const std::int64_t height = min_of(rows - i, L);
      for (int lane = 0; lane < L; ++lane) {
        if (c + lane >= n)
          v[lane] = Vec<T>{};
        else if (height == L)
          v[lane] = load_as<T>(p + i + (c + lane) * col_stride);
        else
          v[lane] = load_first<T>(p + i + (c + lane) * col_stride, height);
      }
      transpose(v);
      T* out = strips + c / L * stride + i * L;
      for (std::int64_t row = 0; row < height; ++row) store(out + row * L, v[row]);
    }
}

template <typename T, typename S>
inline void strips_from_row(const S* p, std::int64_t col_stride, std::int64_t n, T* strips, std::int64_t stride) {
  constexpr int L = kLanes<T>;
  const std::int64_t whole = col_stride == 1 ? n / L * L : 0;
#pragma GCC unroll 4
  for (std::int64_t c = 0; c < whole; c += L, strips += stride) store(strips, load_as<T>(p + c));
  for (std::int64_t c = whole; c < n; c += L, strips += stride)
    read_line(p + c * col_stride, col_stride, min_of(n - c, L), strips);
}

// Rows [i0, i0 + rows) of columns [c0, c0 + n) of X as strips; row i0 goes to strips[0].
template <typename T>
inline void pack_strips(const Rows& x, std::int64_t i0, std::int64_t rows, std::int64_t c0, std::int64_t n, T* strips,
                        std::int64_t stride) {
  constexpr int L = kLanes<T>;
  Cursor at = find_row(x, i0);
  for (std::int64_t done = 0; done < rows;) {
    const Block& b = x.blocks[at.block];
    const std::int64_t count = min_of(rows - done, b.rows - at.row);
    // an empty block may have no address to count from
    if (count > 0)
      with_type(b.data, b.dtype, [&](auto* data) {
        auto* p = data + at.row * b.row_stride + c0 * b.col_stride;
        T* out = strips + done * L;
        if (is_column_major(b)) return strips_from_columns(p, b.col_stride, count, n, out, stride);
        for (std::int64_t i = 0; i < count; ++i)
          strips_from_row(p + i * b.row_stride, b.col_stride, n, out + i * L, stride);
      });
    done += count;
    at = {at.block + 1, 0};
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
