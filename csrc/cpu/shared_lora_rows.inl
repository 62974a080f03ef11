// Rows times a thin matrix and back, for a list of rows: z = x V, and y += g U^T with explicit ends beside it.
namespace loraspan {
namespace LORASPAN_ISA {

// Columns of x that one sum of products runs over before it is added to those before it: fixed, so that neither threads
// nor the other rows decide how a row is summed.
constexpr std::int64_t kProjectColumns = 512;
constexpr std::int64_t kProjectRows = 64;
constexpr std::int64_t kExpandVectors = 2 * kTileVectors;

// Rows `at[0 .. count)` of a matrix.
struct PickedRows {
  Matrix matrix;
  const std::int64_t* at;
  std::int64_t count;
};

// Pointers to columns [c0, c0 + n) of kTileRows picked rows from `first` on, as T: where they lie, or copied to `copy`.
// Past the last row comes the last again.
template <typename T>
inline void tile_rows(const PickedRows& x, std::int64_t first, std::int64_t c0, std::int64_t n, T* copy,
                      const T** rows) {
  for (int i = 0; i < kTileRows; ++i) {
    if (first + i >= x.count) {
      rows[i] = rows[i - 1];
      continue;
    }
    const std::int64_t start = x.at[first + i] * x.matrix.row_stride + c0 * x.matrix.col_stride;
    with_type(x.matrix.data, x.matrix.dtype, [&](auto* data) {
      using S = typename Writable<decltype(data)>::type;
      if constexpr (__is_same(S, T)) {
        if (x.matrix.col_stride == 1) {
          rows[i] = data + start;
          return;
        }
      }
      T* to = copy + i * (kProjectColumns + kLanes<T>);
      read_line(data + start, x.matrix.col_stride, n, to);
      rows[i] = to;
    });
  }
}

// Rows of a thin matrix as vectors: vector j of row c at data + c * step + j * vector_step.
template <typename T>
struct ThinRows {
  const T* data;
  std::int64_t step, vector_step;
};

// Rows [c0, c0 + n) of V [d, k] in vectors of T up to `stride` entries, zeros past k; where they lie if they are such
// already.
template <typename T>
inline ThinRows<T> thin_rows(const Matrix& v, std::int64_t c0, std::int64_t n, std::int64_t k, std::int64_t stride) {
  constexpr std::int64_t L = kLanes<T>;
  if (v.dtype == (sizeof(T) == 4 ? Dtype::f32 : Dtype::f64) && v.col_stride == 1 && k == stride)
    return {static_cast<const T*>(v.data) + c0 * v.row_stride, v.row_stride, L};
  if (is_packed(v.dtype) || (v.row_stride == 1 && v.col_stride != 1)) {
    // columns lie along memory: panels are made by transposing, with lanes for columns of V
    const std::int64_t panel = (n + 1) * L;
    T* panels = scratch<T>(Use::packed, stride / L * panel);
    for (std::int64_t p = 0; p < stride / L; ++p) column_panel(v, k, p, c0, n, panels + p * panel);
    return {panels, L, panel};
  }
  T* copy = scratch<T>(Use::packed, n * stride);
  with_type(v.data, v.dtype, [&](auto* data) {
    for (std::int64_t c = 0; c < n; ++c) read_line(data + (c0 + c) * v.row_stride, v.col_stride, k, copy + c * stride);
  });
  return {copy, stride, L};
}

// Columns [c0, c0 + n) of picked rows [first, last) times V's rows there, put or added to z [., stride].
template <typename T>
void project_block(const PickedRows& x, std::int64_t first, std::int64_t last, std::int64_t c0, std::int64_t n,
                   const Matrix& v, std::int64_t k, Coming coming, bool add, T* z, std::int64_t stride) {
  constexpr int L = kLanes<T>;
  const ThinRows<T> thin = thin_rows<T>(v, c0, n, k, stride);
  T* copy = scratch<T>(Use::weights, kTileRows * (kProjectColumns + L));
  T* spare = scratch<T>(Use::basis, kTileRows * stride);
  const T* rows[kTileRows];
  const PickedRows mine = {x.matrix, x.at, last};
  for (std::int64_t i = first; i < last; i += kTileRows) {
    tile_rows(mine, i, c0, n, copy, rows);
    const std::int64_t real = min_of(kTileRows, last - i);
    // a tile that is not full goes by way of spare memory
    T* out = real == kTileRows ? z + i * stride : spare;
    if (out == spare && add) __builtin_memcpy(spare, z + i * stride, static_cast<size_t>(real * stride) * sizeof(T));
    for_vectors(stride / L, [&](std::int64_t at, auto size) {
      thin_rows_of<T, decltype(size)::value>(real, rows, thin.data + at * thin.vector_step, thin.step, thin.vector_step,
                                             n, add, out + at * L, stride, &coming);
    });
    if (out == spare) __builtin_memcpy(z + i * stride, spare, static_cast<size_t>(real * stride) * sizeof(T));
  }
}

// z [count, stride] = x V; `stride` is k rounded up to whole vectors, and what is past k is 0.
template <typename T>
void project(const PickedRows& x, std::int64_t d, const Matrix& v, std::int64_t k, T* z, std::int64_t stride,
             int threads) {
  constexpr int L = kLanes<T>;
  if (stride == 0) return;
  const std::int64_t blocks = (x.count + kProjectRows - 1) / kProjectRows;
  const std::int64_t slabs = max_of(1, (d + kProjectColumns - 1) / kProjectColumns);
  const bool whole = slabs == 1 || blocks >= 4 * threads || threads == 1;
  const std::int64_t size = x.count * stride;
  T* partial = whole ? z : scratch<T>(Use::sums, slabs * size);
  parallel_for(whole ? blocks : blocks * slabs, threads, [&](std::int64_t task) {
    const std::int64_t first = task % blocks * kProjectRows, last = min_of(x.count, first + kProjectRows);
    for (std::int64_t slab = task / blocks; slab < (whole ? slabs : task / blocks + 1); ++slab) {
      const std::int64_t c0 = slab * kProjectColumns, n = min_of(kProjectColumns, d - c0);
      // what this thread is likely to read next; a lone row reads as fast as memory comes by itself
      const std::int64_t next = x.count == 1 ? d : max_of(slab + 1, (task + threads) / blocks) * kProjectColumns;
      const Coming coming =
          coming_rows(v, next, min_of(d, next + kProjectColumns), n * tiles_of(last - first, stride / L));
      project_block(x, first, last, c0, n, v, k, coming, whole && slab > 0, partial + (whole ? 0 : slab * size),
                    stride);
    }
  });
  if (whole) return;
  parallel_for(blocks, threads, [&](std::int64_t block) {
    const std::int64_t end = min_of(x.count, (block + 1) * kProjectRows) * stride;
    for (std::int64_t i = block * kProjectRows * stride; i < end; i += L) {
      Vec<T> sum = load(static_cast<const T*>(partial) + i);
      for (std::int64_t slab = 1; slab < slabs; ++slab)
        sum = sum + load(static_cast<const T*>(partial) + slab * size + i);
      store(z + i, sum);
    }
  });
}

// Ends in a table, a row of `length` entries each.
struct EndTable {
  const void* data;
  const std::uint16_t* scales;  // of packed rows
  std::int64_t length;
  Dtype dtype;
};

inline PackedRows packed_ends(const EndTable& t) {
  return {static_cast<const std::uint8_t*>(t.data), t.scales, t.length, bits_of(t.dtype)};
}

// Calls body(p) with `p` as the entries [first, first + n) of a row; packed ones are unpacked to `spare` first.
template <typename T, typename Body>
inline void with_end(const EndTable& t, std::int64_t row, std::int64_t first, std::int64_t n, T* spare,
                     const Body& body) {
  if (is_packed(t.dtype)) {
    unpack_line(packed_ends(t), row, first, n, spare);
    return body(static_cast<const T*>(spare));
  }
  with_type(t.data, t.dtype, [&](auto* data) { body(data + row * t.length + first); });
}

// An explicit left end of a row: `share` times that row of the table of ends.
template <typename T>
struct OwnEnd {
  std::int64_t row;
  T share;
};

// The explicit ends of picked row i are ends[i * most .. i * most + counts[i]).
template <typename T>
struct OwnEnds {
  const OwnEnd<T>* ends;
  const std::int64_t* counts;
  std::int64_t most;
  EndTable table;
};

template <typename T>
inline void add_own_ends(const OwnEnds<T>& own, std::int64_t row, std::int64_t c0, std::int64_t n, T* sums) {
  constexpr int L = kLanes<T>;
  alignas(64) T spare[kExpandVectors * L];
  for (std::int64_t e = 0; e < own.counts[row]; ++e) {
    const OwnEnd<T>& end = own.ends[row * own.most + e];
    const Vec<T> share = broadcast(end.share);
    with_end<T>(own.table, end.row, c0, n, spare, [&](auto* data) {
      for (std::int64_t c = 0; c < n; c += L) {
        const Vec<T> entries = n - c < L ? load_first<T>(data + c, n - c) : load_as<T>(data + c);
        store(sums + c, share * entries + load(static_cast<const T*>(sums) + c));
      }
    });
  }
}

// y[row, c0 .. c0 + n) += sums, rounded once.
template <typename T>
inline void add_to_row(const Matrix& y, std::int64_t row, std::int64_t c0, std::int64_t n, const T* sums) {
  constexpr int L = kLanes<T>;
  with_type(y.data, y.dtype, [&](auto* data) {
    using S = typename Writable<decltype(data)>::type;
    S* p = const_cast<S*>(data) + row * y.row_stride + c0 * y.col_stride;
    if (y.col_stride != 1) {
      for (std::int64_t c = 0; c < n; ++c)
        round_entry(p + c * y.col_stride, static_cast<T>(widen_entry(p[c * y.col_stride])) + sums[c]);
      return;
    }
    std::int64_t c = 0;
    for (; c + L <= n; c += L) store_as(p + c, load_as<T>(static_cast<const S*>(p) + c) + load(sums + c));
    if (c < n) store_first<T>(p + c, load_first<T>(static_cast<const S*>(p) + c, n - c) + load(sums + c), n - c);
  });
}

// Picked rows of y += g U^T and their explicit ends. g [count, stride], of which k entries count.
template <typename T>
void expand(const PickedRows& y, std::int64_t n, const Matrix& u, std::int64_t k, const T* g, std::int64_t stride,
            const OwnEnds<T>* own, int threads) {
  constexpr int L = kLanes<T>;
  constexpr std::int64_t kWidth = kExpandVectors * L;
  parallel_for((n + kWidth - 1) / kWidth, threads, [&](std::int64_t task) {
    const std::int64_t c0 = task * kWidth, width = min_of(kWidth, n - c0), vectors = (width + L - 1) / L;
    const std::int64_t panel = (k + 1) * L;
    T* panels = scratch<T>(Use::basis, vectors * panel);
    if (k > 0) row_panels(u, k, c0, width, panels, panel);
    T* sums = scratch<T>(Use::tile, kTileRows * kWidth);
    const std::int64_t next = (task + threads) * kWidth;
    Coming coming = coming_rows(u, next, min_of(n, next + kWidth), k * tiles_of(y.count, vectors));
    for (std::int64_t i = 0; i < y.count; i += kTileRows) {
      const T* rows[kTileRows];
      for (int r = 0; r < kTileRows; ++r) rows[r] = g + min_of(i + r, y.count - 1) * stride;
      for_vectors(vectors, [&](std::int64_t at, auto size) {
        thin_rows_of<T, decltype(size)::value>(y.count - i, rows, panels + at * panel, L, panel, k, false,
                                               sums + at * L, kWidth, &coming);
      });
      for (std::int64_t r = 0; r < min_of(kTileRows, y.count - i); ++r) {
        if (own) add_own_ends(*own, i + r, c0, width, sums + r * kWidth);
        add_to_row<T>(y.matrix, y.at[i + r], c0, width, sums + r * kWidth);
      }
    }
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
