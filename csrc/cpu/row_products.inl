// Products of rows of X with a matrix that is at hand, panel by panel: what sketch, power and combine have in common.
namespace loraspan {
namespace LORASPAN_ISA {

// Columns whose products are summed in T before they are added in float64.
constexpr std::int64_t kSumColumns = 128;
// Rows that are packed, and multiplied, together.
constexpr std::int64_t kPanelRows = 16;

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
template <bool kAcross, typename T, typename Coming>
inline void multiply_panel(const T* packed, std::int64_t stride, const T* b, std::int64_t b_stride, std::int64_t n,
                           bool fresh, double* sums, std::int64_t row_sums, Coming coming) {
  constexpr int L = kLanes<T>;
  for_vectors(row_sums / L, [&](std::int64_t first, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value, kRows = kRowsBeside<kVectors>;
    const T* columns = b + first * b_stride;
    for (std::int64_t i = 0; i < kPanelRows; i += kRows) {
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
  for (int i = 0; i < kRows; ++i) {
    while (at.block < x.count && at.row >= x.blocks[at.block].rows) at = {at.block + 1, 0};
    if (at.block == x.count) {
      panel->start[i] = i > 0 ? panel->start[i - 1] : 0;
      panel->step[i] = i > 0 ? panel->step[i - 1] : 0;
      continue;
    }
    const Block& b = x.blocks[at.block];
    const std::int64_t bytes = entry_bytes(b.dtype), row = is_column_major(b) ? kSumColumns : b.row_stride;
    panel->start[i] = reinterpret_cast<std::uintptr_t>(b.data) + static_cast<std::uintptr_t>(at.row * row * bytes);
    panel->step[i] = static_cast<std::uintptr_t>(b.col_stride * bytes);
    ++at.row;
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

// Columns [first, last) of X times the rows of b for these columns: added up by themselves, then written to the sums of
// all rows, or added to what is there. Vector v of the row of b for column c is at b + v * b_stride + (c - first) * L.
template <typename T>
void add_products(const Rows& x, std::int64_t first, std::int64_t last, const T* b, std::int64_t b_stride, bool fresh,
                  double* sums, std::int64_t row_sums) {
  constexpr std::int64_t L = kLanes<T>;
  const std::int64_t all = row_count(x);
  T* packed = scratch<T>(Use::packed, kSumColumns * kPanelRows);
  double* apart = scratch<double>(Use::part, kPanelRows * row_sums);
  PanelMemory<kPanelRows> here, next;
  Cursor at = find_row(x, 0);
  locate_panel(x, at, &next);
  for (std::int64_t i = 0; i < all; i += kPanelRows) {
    double* whole = sums + i * row_sums;
    double* panel = fresh ? whole : apart;
    const Cursor after = skip_rows(x, at, kPanelRows);
    here = next;
    locate_panel(x, after, &next);
    const Rows rest = {x.blocks + at.block, x.count - at.block, x.columns};
    for (std::int64_t c = first; c == first || c < last; c += kSumColumns) {
      const std::int64_t n = min_of(last - c, kSumColumns);
      const std::int64_t height = min_of(all - i, kPanelRows);
      const bool wraps = c + kSumColumns >= last;
      if (is_column_major(rest.blocks[0])) {
        // columns lie one after the other: nothing to transpose
        Cursor from = at;
        for (std::int64_t p = 0; p < kPanelRows; p += L, from = skip_rows(x, from, L))
          copy_panel(x, from, height - p, c, n, packed + p * kSumColumns);
        const ComingPanel coming =
            wraps ? coming_panel(x, after).from(first) : coming_panel(x, at).from(c + kSumColumns);
        multiply_panel<false>(packed, kSumColumns * L, b + (c - first) * L, b_stride, n, c == first, panel, row_sums,
                              coming);
        continue;
      }
      pack_strips(rest, at.row, height, c, n, packed, kPanelRows * L);
      const PanelMemory<kPanelRows>& memory = wraps ? next : here;
      const std::uintptr_t column = static_cast<std::uintptr_t>(wraps ? first : c + kSumColumns);
      // where a row begins within a line, that line is the end of what was packed before
      std::uintptr_t rows[kPanelRows];
      for (int r = 0; r < kPanelRows; ++r) rows[r] = memory.start[r] + column * memory.step[r] + 63;
      const Ahead ahead = {rows, kSumColumns * entry_bytes(rest.blocks[0].dtype)};
      multiply_panel<true>(packed, kPanelRows * L, b + (c - first) * L, b_stride, n, c == first, panel, row_sums,
                           ahead);
    }
    if (!fresh) add_sums(kPanelRows * row_sums, apart, whole);
    at = after;
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
