// V = X^T W and V^T V where X V is not asked for. Nothing is packed: rows of X, which lie along memory, are multiplied
// by entries of W as they are loaded, into tiles of V^T; so V is best stored column after column.
namespace loraspan {
namespace LORASPAN_ISA {

// A chunk of columns of X: its part of V^T stays in cache while the rows of X go by.
constexpr std::int64_t kImageColumns = 512;
// So many rows of a chunk stay in cache while all of W is applied to them.
constexpr std::int64_t kImageRows = 128;

struct ImageShape {
  std::int64_t rows, k;
  std::int64_t groups;  // of kTileRows columns of W
  std::int64_t slab_width;
};

inline ImageShape image_shape(const CombineJob& job) {
  const std::int64_t rows = row_count(job.x), least = max_of(2048, (std::int64_t{1} << 19) / max_of(rows, 1));
  return {rows, job.k, (job.k + kTileRows - 1) / kTileRows, slab_columns(job.x.columns, least, 32)};
}

// W in groups of kTileRows columns: entry (i, g * kTileRows + r) at out[(g * rows + i) * kTileRows + r].
template <typename T>
inline void pack_weight_groups(const CombineJob& job, const ImageShape& s, T* out) {
  for (std::int64_t g = 0; g < s.groups; ++g)
    for (std::int64_t i = 0; i < s.rows; ++i)
      for (std::int64_t r = 0; r < kTileRows; ++r) {
        const std::int64_t j = g * kTileRows + r;
        out[(g * s.rows + i) * kTileRows + r] = j < s.k ? static_cast<T>(job.w[i * s.k + j]) : T{0};
      }
}

// Adds the products of `rows` rows of X to kTileRows rows of V^T, in N vectors of columns. Vector q of row i begins at
// x + i * row_step + q * vector_step; `ahead` entries on lies what is wanted next.
template <typename T, int N, typename S>
__attribute__((noinline)) void image_tile(const S* x, std::int64_t row_step, std::int64_t vector_step,
                                          std::int64_t ahead, std::int64_t rows, const T* weights, T* image) {
  constexpr int L = kLanes<T>, M = kTileRows;
  Vec<T> sums[M][N];
  LORASPAN_UNROLL
  for (int r = 0; r < M; ++r) LORASPAN_UNROLL
  for (int q = 0; q < N; ++q) sums[r][q] = load(image + r * kImageColumns + q * L);
  for (std::int64_t i = 0; i < rows; ++i) {
    const S* row = x + i * row_step;
    Vec<T> columns[N];
    LORASPAN_UNROLL
    for (int q = 0; q < N; ++q) {
      columns[q] = load_as<T>(row + q * vector_step);
      __builtin_prefetch(row + q * vector_step + ahead);
    }
    LORASPAN_UNROLL
    for (int r = 0; r < M; ++r) {
      const Vec<T> w = broadcast(weights[i * M + r]);
      LORASPAN_UNROLL
      for (int q = 0; q < N; ++q) sums[r][q] = w * columns[q] + sums[r][q];
    }
  }
  LORASPAN_UNROLL
  for (int r = 0; r < M; ++r) LORASPAN_UNROLL
  for (int q = 0; q < N; ++q) store(image + r * kImageColumns + q * L, sums[r][q]);
}

// Rows [i0, i0 + rows) of X, which begin at x, in `vectors` vectors of columns.
template <typename T, typename S>
inline void image_rows(const ImageShape& s, const S* x, std::int64_t row_step, std::int64_t vector_step,
                       std::int64_t i0, std::int64_t rows, std::int64_t vectors, const T* weights, T* image) {
  constexpr int L = kLanes<T>;
  for (std::int64_t g = 0; g < s.groups; ++g)
    for_vectors(vectors, [&](std::int64_t first, auto size) {
      constexpr int N = decltype(size)::value;
      // the tile after this one, of the same rows
      const std::int64_t ahead = vector_step == L ? N * L : 0;
      image_tile<T, N>(x + first * vector_step, row_step, vector_step, ahead, rows,
                       weights + (g * s.rows + i0) * kTileRows, image + g * kTileRows * kImageColumns + first * L);
    });
}

// Columns [c0, c0 + n) of V^T, not yet rounded.
template <typename T>
inline void form_image(const CombineJob& job, const ImageShape& s, const T* weights, std::int64_t c0, std::int64_t n,
                       T* strips, T* image) {
  constexpr int L = kLanes<T>;
  for (std::int64_t i = 0; i < s.groups * kTileRows * kImageColumns; ++i) image[i] = 0;
  std::int64_t at = 0;
  for (std::int64_t block = 0; block < job.x.count; ++block) {
    const Block& b = job.x.blocks[block];
    for (std::int64_t i = 0; i < b.rows; i += kImageRows) {
      const std::int64_t rows = min_of(kImageRows, b.rows - i);
      if (b.col_stride == 1 && n % L == 0) {
        with_type(b.data, b.dtype, [&](auto* p) {
          image_rows<T>(s, p + i * b.row_stride + c0, b.row_stride, L, at + i, rows, n / L, weights, image);
        });
      } else {
        constexpr std::int64_t kStride = kImageRows * L + L;
        pack_strips(job.x, at + i, rows, c0, n, strips, kStride);
        image_rows<T>(s, static_cast<const T*>(strips), L, kStride, at + i, rows, (n + L - 1) / L, weights, image);
      }
    }
    at += b.rows;
  }
}

// Writes columns [c0, c0 + n) of V^T and leaves them in `image` as they were rounded.
template <typename T>
inline void store_image(const CombineJob& job, const ImageShape& s, std::int64_t c0, std::int64_t n, T* image) {
  constexpr int L = kLanes<T>;
  with_type(job.v, job.v_dtype, [&](auto* v) {
    using S = typename Writable<decltype(v)>::type;
    S* out = const_cast<S*>(v);
    for (std::int64_t j = 0; j < s.k; ++j)
      for (std::int64_t c = 0; c < n; c += L) {
        T* entries = image + j * kImageColumns + c;
        S* p = out + (c0 + c) * job.v_row_stride + j * job.v_col_stride;
        store(entries, round_to<S, T>(p, job.v_row_stride, min_of(L, n - c), load(static_cast<const T*>(entries))));
      }
  });
}

inline double add_all_lanes(Vec<double> x) { return add_lanes(x); }
inline double add_all_lanes(Vec<float> x) {
  alignas(64) float entries[kLanes<float>];
  store(entries, x);
  constexpr int L = kLanes<double>;
  return add_lanes(load_as<double>(entries) + load_as<double>(entries + L));
}

// Adds to rows i and columns [j, j + N) of V^T V. A lane's sum runs over at most kImageColumns / kLanes columns.
template <typename T, int N>
inline void image_products(const T* image, std::int64_t i, std::int64_t j, std::int64_t n, double* out) {
  constexpr int L = kLanes<T>;
  Vec<T> sums[N] = {};
  for (std::int64_t c = 0; c < n; c += L) {
    const Vec<T> x = load(image + i * kImageColumns + c);
    LORASPAN_UNROLL
    for (int q = 0; q < N; ++q) sums[q] = x * load(image + (j + q) * kImageColumns + c) + sums[q];
  }
  LORASPAN_UNROLL
  for (int q = 0; q < N; ++q) out[q] += add_all_lanes(sums[q]);
}

template <typename T>
inline void image_slab(const CombineJob& job, std::int64_t slab, double* sums) {
  constexpr int L = kLanes<T>;
  const ImageShape s = image_shape(job);
  T* weights = scratch<T>(Use::weights, s.groups * s.rows * kTileRows);
  T* strips = scratch<T>(Use::packed, kImageColumns / L * (kImageRows * L + L));
  T* image = scratch<T>(Use::basis, s.groups * kTileRows * kImageColumns);
  pack_weight_groups(job, s, weights);
  for (std::int64_t i = 0; i < s.k * s.k; ++i) sums[i] = 0;
  const std::int64_t end = min_of(job.x.columns, (slab + 1) * s.slab_width);
  for (std::int64_t c = slab * s.slab_width; c < end; c += kImageColumns) {
    const std::int64_t n = min_of(kImageColumns, end - c);
    form_image(job, s, weights, c, n, strips, image);
    store_image(job, s, c, n, image);
    for (std::int64_t i = 0; i < s.k; ++i) {
      double* row = sums + i * s.k;
      std::int64_t j = 0;
      for (; j + 4 <= i + 1; j += 4) image_products<T, 4>(image, i, j, n, row + j);
      for (; j <= i; ++j) image_products<T, 1>(image, i, j, n, row + j);
    }
  }
}

// Adds the slabs in order and writes a share of the rows of V^T V.
inline void finish_image(const CombineJob& job, std::int64_t slabs, const double* sums, std::int64_t part,
                         std::int64_t parts) {
  const std::int64_t k = job.k;
  for (std::int64_t i = k * part / parts; i < k * (part + 1) / parts; ++i)
    for (std::int64_t j = 0; j <= i; ++j) {
      double sum = sums[i * k + j];
      for (std::int64_t slab = 1; slab < slabs; ++slab) sum += sums[(slab * k + i) * k + j];
      job.vtv[i * k + j] = job.vtv[j * k + i] = sum;
    }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
