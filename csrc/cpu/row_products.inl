// Products of rows of X with a matrix that is at hand, panel by panel: what sketch, power and combine have in common.
namespace loraspan {
namespace LORASPAN_ISA {

// Columns whose products are summed in T before they are added in float64.
constexpr std::int64_t kSumColumns = 128;
// Rows that are packed, and multiplied, together; rows of one block, where they lie along memory, more of them: what
// they are multiplied by is then used more often while it is near.
constexpr std::int64_t kPanelRows = 16;
constexpr std::int64_t kTallRows = 32;

// A panel of a column-major block as memory: where column 0 of its first row is, and how far the next column is, in
// bytes. Addresses are numbers because they may lie past what they were made from; nothing reads there.
struct ComingPanel {
  std::uintptr_t start, step;

  ComingPanel from(std::int64_t column) const { return {start + static_cast<std::uintptr_t>(column) * step, step}; }
};

inline ComingPanel coming_panel(const Rows& x, Cursor at) {
  if (at.block >= x.count) return {0, 0};
  const Block& b = x.blocks[at.block];
  const std::int64_t bytes = entry_bytes(b.dtype);
  return {reinterpret_cast<std::uintptr_t>(b.data) + static_cast<std::uintptr_t>(at.row * b.row_stride * bytes),
          static_cast<std::uintptr_t>(b.col_stride * bytes)};
}

// pack_panel for those who bring near what they pack next: rows of one column-major block are copied and no more.
template <typename T>
inline void copy_panel(const Rows& x, Cursor at, std::int64_t rows, std::int64_t c0, std::int64_t n, T* panel) {
  constexpr std::int64_t L = kLanes<T>;
  if (rows < L || !is_column_major(x.blocks[at.block]) || x.blocks[at.block].rows - at.row < L)
    return pack_panel(x, at, max_of(0, min_of(rows, L)), c0, n, panel);
  const Block& b = x.blocks[at.block];
  with_type(b.data, b.dtype, [&](auto* data) {
    auto* p = data + at.row + c0 * b.col_stride;
    for (std::int64_t c = 0; c < n; ++c) store(panel + c * L, load_as<T>(p + c * b.col_stride));
  });
}

// Brings near, while kRows rows from row i of a panel on are multiplied in columns [k, k + L), their share of the next.
template <int kRows, int L>
inline __attribute__((always_inline)) void bring(Ahead ahead, std::int64_t i, std::int64_t k) {
  prefetch_line<kRows>({ahead.rows + i, ahead.bytes}, k / L);
}

template <int kRows, int L>
inline __attribute__((always_inline)) void bring(ComingPanel panel, std::int64_t i, std::int64_t k) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) __builtin_prefetch(reinterpret_cast<const void*>(panel.from(k + i % L + r).start));
}

// Adds the products of a panel of rows, packed as strips (kAcross) or as panels `stride` apart, with n rows of b to its
// sums, or writes them if the sums are fresh. Vector v of row k of b is at b + v * b_stride + k * L. `coming` is what
// is packed next.
template <bool kAcross, std::int64_t kHeight, typename T, typename Coming>
inline void multiply_panel(const T* packed, std::int64_t stride, const T* b, std::int64_t b_stride, std::int64_t n,
                           bool fresh, double* sums, std::int64_t row_sums, Coming coming) {
  constexpr int L = kLanes<T>;
  for_vectors(row_sums / L, [&](std::int64_t first, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value, kRows = kRowsBeside<kVectors>;
    const T* columns = b + first * b_stride;
    for (std::int64_t i = 0; i < kHeight; i += kRows) {
      Vec<T> sum[kRows][kVectors] = {};
      for (std::int64_t k = 0; k < n; k += L) {
        if (first == 0) bring<kRows, L>(coming, i, k);
        const std::int64_t some = min_of(n - k, L);
        if constexpr (kAcross)
          sum_across<T, kRows, kVectors>(packed + k / L * stride + i * L, stride, columns + k * L, b_stride, some, sum);
        else
          sum_along<T, kRows, kVectors>(packed + i / L * stride + i % L + k * L, stride, columns + k * L, b_stride,
                                        some, sum);
      }
      double* y = sums + i * row_sums + first * L;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          double* p = y + r * row_sums + v * L;
          fresh ? flush<false>(p, sum[r][v]) : flush<true>(p, sum[r][v]);
        }
    }
  });
}

// The rows of a panel as memory: where column 0 of each is, and how far the next column is, both in bytes. A panel of
// a column-major block is one stretch of memory, of which each row counts a part.
template <std::int64_t kRows>
struct PanelMemory {
  std::uintptr_t start[kRows];
  std::uintptr_t step[kRows];
};

template <std::int64_t kRows>
inline void locate_panel(const Rows& x, Cursor at, PanelMemory<kRows>* panel) {
  std::uintptr_t start = 0, step = 0;
  std::int64_t done = 0;
  for (; done < kRows && at.block < x.count; at = {at.block + 1, 0}) {
    const Block& b = x.blocks[at.block];
    const std::int64_t bytes = entry_bytes(b.dtype), row = is_column_major(b) ? kSumColumns : b.row_stride;
    const std::int64_t count = min_of(kRows - done, b.rows - at.row);
    for (std::int64_t i = 0; i < count; ++i, ++done) {
      start = reinterpret_cast<std::uintptr_t>(b.data) + static_cast<std::uintptr_t>((at.row + i) * row * bytes);
      step = static_cast<std::uintptr_t>(b.col_stride * bytes);
      panel->start[done] = start;
      panel->step[done] = step;
    }
  }
  for (; done < kRows; ++done) {
    panel->start[done] = start;
    panel->step[done] = step;
  }
}

inline Cursor skip_rows(const Rows& x, Cursor at, std::int64_t rows) {
  at.row += rows;
  while (at.block < x.count && at.row >= x.blocks[at.block].rows) at.row -= x.blocks[at.block++].rows;
  return at;
}

// The kRows rows from `at` on, of which `rows` exist, in at most kSumColumns columns, as panels that lie
// kSumColumns * L apart.
template <std::int64_t kRows = kPanelRows, typename T>
inline void pack_group(const Rows& x, Cursor at, std::int64_t rows, std::int64_t c0, std::int64_t n, T* panels) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t i = 0; i < kRows; i += L) {
    pack_panel(x, at, max_of(0, min_of(rows - i, L)), c0, n, panels + i * kSumColumns);
    at = skip_rows(x, at, L);
  }
}

// Columns [first, last) of X, and the rows of b for these columns: vector v of the one for column c is at
// b + v * b_stride + (c - first) * L. What they add to a row of X is row_sums sums.
template <typename T>
struct Products {
  Rows x;
  std::int64_t first, last;
  const T* b;
  std::int64_t b_stride, row_sums;

  const T* row(std::int64_t c) const { return b + (c - first) * kLanes<T>; }
};

// The sums of kHeight rows from `at` on, of which `height` exist, that lie along memory; `after` come the next.
template <std::int64_t kHeight, typename T>
inline void multiply_rows(const Products<T>& p, Cursor at, Cursor after, std::int64_t height, double* sums) {
  constexpr std::int64_t L = kLanes<T>;
  T* packed = scratch<T>(Use::packed, kSumColumns * kHeight);
  PanelMemory<kHeight> here, next;
  locate_panel(p.x, at, &here);
  locate_panel(p.x, after, &next);
  const Rows rest = {p.x.blocks + at.block, p.x.count - at.block, p.x.columns};
  for (std::int64_t c = p.first; c == p.first || c < p.last; c += kSumColumns) {
    const std::int64_t n = min_of(p.last - c, kSumColumns);
    pack_strips(rest, at.row, height, c, n, packed, kHeight * L);
    const bool wraps = c + kSumColumns >= p.last;
    const PanelMemory<kHeight>& memory = wraps ? next : here;
    const std::uintptr_t column = static_cast<std::uintptr_t>(wraps ? p.first : c + kSumColumns);
    // where a row begins within a line, that line is the end of what was packed before
    std::uintptr_t rows[kHeight];
    for (int r = 0; r < kHeight; ++r) rows[r] = memory.start[r] + column * memory.step[r] + 63;
    const Ahead ahead = {rows, kSumColumns * entry_bytes(rest.blocks[0].dtype)};
    multiply_panel<true, kHeight>(packed, kHeight * L, p.row(c), p.b_stride, n, c == p.first, sums, p.row_sums, ahead);
  }
}

// The same of kPanelRows rows whose columns lie one after the other: nothing to transpose.
template <typename T>
inline void multiply_columns(const Products<T>& p, Cursor at, Cursor after, std::int64_t height, double* sums) {
  constexpr std::int64_t L = kLanes<T>;
  T* packed = scratch<T>(Use::packed, kSumColumns * kPanelRows);
  for (std::int64_t c = p.first; c == p.first || c < p.last; c += kSumColumns) {
    const std::int64_t n = min_of(p.last - c, kSumColumns);
    Cursor from = at;
    for (std::int64_t i = 0; i < kPanelRows; i += L, from = skip_rows(p.x, from, L))
      copy_panel(p.x, from, height - i, c, n, packed + i * kSumColumns);
    const bool wraps = c + kSumColumns >= p.last;
    const ComingPanel coming =
        wraps ? coming_panel(p.x, after).from(p.first) : coming_panel(p.x, at).from(c + kSumColumns);
    multiply_panel<false, kPanelRows>(packed, kSumColumns * L, p.row(c), p.b_stride, n, c == p.first, sums, p.row_sums,
                                      coming);
  }
}

// The products of all rows of X: added up by themselves, then written to sums, or added to what is there.
template <typename T>
void add_products(const Products<T>& p, bool fresh, double* sums) {
  double* apart = scratch<double>(Use::part, kTallRows * p.row_sums);
  Cursor at = find_row(p.x, 0);
  for (std::int64_t left = row_count(p.x), rows; left > 0; left -= rows, sums += rows * p.row_sums) {
    const Block& block = p.x.blocks[at.block];
    const bool is_tall = !is_column_major(block) && block.rows - at.row >= kTallRows;
    rows = is_tall ? kTallRows : kPanelRows;
    const Cursor after = skip_rows(p.x, at, rows);
    double* panel = fresh ? sums : apart;
    if (is_tall)
      multiply_rows<kTallRows>(p, at, after, kTallRows, panel);
    else if (is_column_major(block))
      multiply_columns(p, at, after, min_of(left, kPanelRows), panel);
    else
      multiply_rows<kPanelRows>(p, at, after, min_of(left, kPanelRows), panel);
    if (!fresh) add_sums(rows * p.row_sums, apart, sums);
    at = after;
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
