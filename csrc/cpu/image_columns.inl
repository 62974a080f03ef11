// Rows of X^T W for columns of X that lie along memory: entries of X, packed as panels, are multiplied by rows of W.
// And what turns such rows into columns and back.
namespace loraspan {
namespace LORASPAN_ISA {

// So far is a vector of a row of X^T W from the one before it.
template <typename T>
constexpr std::int64_t kBasisStride = (kImageColumns + 1) * kLanes<T>;

// Row i of W in vectors: vector v at out[(v * rows + i) * L].
template <typename T>
inline void pack_weight_vectors(const Image& s, T* out) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t i = 0; i < s.rows; ++i)
    for (std::int64_t v = 0; v < s.width / L; ++v) {
      const double* w = s.w + i * s.k + v * L;
      const std::int64_t n = max_of(0, min_of(L, s.k - v * L));
      store(out + (v * s.rows + i) * L, n == L ? load_as<T>(w) : load_first<T>(w, n));
    }
}

// Columns that are packed at a time: with the part of W that they are multiplied by, they stay in the first cache.
constexpr std::int64_t kPanelColumns = 32;
template <typename T>
constexpr std::int64_t kPanelStride = (kPanelColumns + 1) * kLanes<T>;

// Adds the products of kTileRows columns of `rows` rows, packed as panels, to as many rows of X^T W, in N vectors.
// From `column` on, what is packed next is brought near.
template <typename T, int N>
__attribute__((noinline)) void columns_tile(const T* panels, std::int64_t rows, const ComingPanel* coming,
                                            std::int64_t column, const T* weights, std::int64_t stride, T* basis) {
  constexpr int L = kLanes<T>, M = kTileRows;
  Vec<T> sums[M][N] = {};
  for (std::int64_t start = 0; start < rows; start += L, panels += kPanelStride<T>) {
    const std::int64_t end = min_of(rows, start + L);
    const ComingPanel near = (coming++)->from(column);
    for (std::int64_t i = start; i < end; ++i) {
      __builtin_prefetch(reinterpret_cast<const void*>(near.from((i - start) * M / L).start));
      Vec<T> row[N];
      LORASPAN_UNROLL
      for (int v = 0; v < N; ++v) row[v] = load(weights + v * stride + i * L);
      LORASPAN_UNROLL
      for (int c = 0; c < M; ++c) {
        const Vec<T> x = broadcast(panels[c * L + i - start]);
        LORASPAN_UNROLL
        for (int v = 0; v < N; ++v) sums[c][v] = x * row[v] + sums[c][v];
      }
    }
  }
  LORASPAN_UNROLL
  for (int c = 0; c < M; ++c) LORASPAN_UNROLL
  for (int v = 0; v < N; ++v) {
    T* whole = basis + v * kBasisStride<T> + c * L;
    store(whole, load(static_cast<const T*>(whole)) + sums[c][v]);
  }
}

// Rows [c0, c0 + n) of X^T W: vector v of row c at basis[v * kBasisStride + c * L]. What lies behind row n
// is zero up to whole tiles.
template <typename T>
inline void form_columns(const Image& s, const T* weights, std::int64_t c0, std::int64_t n, T* basis) {
  constexpr std::int64_t L = kLanes<T>;
  T* panels = scratch<T>(Use::packed, kImageRows / L * kPanelStride<T>);
  const std::int64_t entries = s.width / L * kBasisStride<T>;
  for (std::int64_t i = 0; i < entries; ++i) basis[i] = 0;
  Cursor at = find_row(s.x, 0);
  for (std::int64_t i = 0; i < s.rows; i += kImageRows, at = skip_rows(s.x, at, kImageRows)) {
    const std::int64_t rows = min_of(kImageRows, s.rows - i);
    for (std::int64_t c = 0; c < n; c += kPanelColumns) {
      const std::int64_t some = min_of(kPanelColumns, n - c);
      ComingPanel coming[kImageRows / L];
      Cursor from = at;
      for (std::int64_t p = 0; p < rows; p += L, from = skip_rows(s.x, from, L)) {
        T* panel = panels + p / L * kPanelStride<T>;
        copy_panel(s.x, from, rows - p, c0 + c, some, panel);
        for (std::int64_t q = some * L; q < round_up(some, kTileRows) * L; ++q) panel[q] = 0;
        coming[p / L] = coming_panel(s.x, from);
      }
      for_vectors(s.width / L, [&](std::int64_t first, auto vectors) {
        for (std::int64_t q = 0; q < some; q += kTileRows)
          columns_tile<T, decltype(vectors)::value>(panels + q * L, rows, coming, c0 + c + q + kPanelColumns,
                                                    weights + (first * s.rows + i) * L, s.rows * L,
                                                    basis + first * kBasisStride<T> + (c + q) * L);
      });
    }
  }
}

// W^T X [k, n], its rows kImageStride apart, from rows of X^T W.
template <typename T>
inline void turn_basis(const T* basis, const Image& s, std::int64_t n, T* image) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t v = 0; v < s.k; v += L)
    for (std::int64_t c = 0; c < n; c += L) {
      Vec<T> rows[L];
      for (std::int64_t i = 0; i < L; ++i) rows[i] = load(basis + v / L * kBasisStride<T> + (c + i) * L);
      transpose(rows);
      for (std::int64_t i = 0; i < min_of(L, s.k - v); ++i) store(image + (v + i) * kImageStride<T> + c, rows[i]);
    }
}

// Rows of X^T W, as form_columns leaves them, from W^T X.
template <typename T>
inline void turn_image(const T* image, const Image& s, std::int64_t n, T* out) {
  constexpr int L = kLanes<T>;
  for (std::int64_t v = 0; v < s.width; v += L)
    for (std::int64_t c = 0; c < n; c += L) {
      Vec<T> rows[L];
      for (int i = 0; i < L; ++i) rows[i] = v + i < s.k ? load(image + (v + i) * kImageStride<T> + c) : Vec<T>{};
      transpose(rows);
      T* to = out + v / L * kBasisStride<T> + c * L;
      for (int i = 0; i < L; ++i) store(to + i * L, rows[i]);
    }
}

// W in T, in the order in which its side of X is gone along.
template <typename T>
inline const T* pack_weights(const Image& s) {
  T* weights = scratch<T>(Use::weights, s.weight_entries());
  s.by_columns ? pack_weight_vectors(s, weights) : pack_weight_groups(s, weights);
  return weights;
}

// Columns [c0, c0 + n) of W^T X, whichever way X lies in memory: row j at image + j * kImageStride.
template <typename T>
inline void make_image(const Image& s, const T* weights, std::int64_t c0, std::int64_t n, T* image) {
  if (!s.by_columns) return form_image(s, weights, c0, n, image);
  T* basis = scratch<T>(Use::columns, s.width / kLanes<T> * kBasisStride<T>);
  form_columns(s, weights, c0, n, basis);
  turn_basis(basis, s, n, image);
}

// The same as rows of X^T W.
template <typename T>
inline void make_basis(const Image& s, const T* weights, std::int64_t c0, std::int64_t n, T* basis) {
  if (s.by_columns) return form_columns(s, weights, c0, n, basis);
  T* image = scratch<T>(Use::basis, s.groups * kTileRows * kImageStride<T>);
  form_image(s, weights, c0, n, image);
  turn_image(image, s, n, basis);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
