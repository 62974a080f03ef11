// gram: the lower triangle tile by tile, then its mirror image.
//
// Few rows: X is cut into slabs of columns, each thread takes whole slabs, and their float64 sums are added in order.
// Many rows: all threads pack a chunk of columns, then share its tiles, and G itself holds the sums.
// Which of the two, and every boundary, follows from the sizes of the job alone.
namespace loraspan {
namespace LORASPAN_ISA {

// Up to so many rows, the sums of a slab and a packed chunk stay in a second-level cache.
constexpr std::int64_t kSlabRows = 256;
// A block of so many rows by so many rows of G is what a thread takes at a time; its panels stay in cache.
constexpr std::int64_t kBlockRows = 192;

template <typename T>
constexpr std::int64_t kChunk = 2048 / static_cast<std::int64_t>(sizeof(T));

template <typename T>
inline std::int64_t row_unit() {
  return kLanes<T> > kTileRows ? kLanes<T> : kTileRows;
}

// The sums of one job: entry (i, j), j <= i, at data + i * stride + j. Rows and columns below `limit` may be written.
struct Sums {
  double* data;
  std::int64_t stride;
  std::int64_t limit;
  bool fresh;   // overwrite, as nothing is there yet
  bool mirror;  // these are the last products: write (j, i) as well
};

// Adds a tile [M, columns] at (i, j) of G.
template <int M, int kColumns>
inline void add_tile(const Sums& g, std::int64_t i, std::int64_t j, const double* tile_sums) {
  constexpr int L = kLanes<double>;
  const std::int64_t rows = min_of(M, g.limit - i), columns = min_of(kColumns, g.limit - j);
  alignas(64) double total[M * kColumns];
  for (std::int64_t r = 0; r < rows; ++r) {
    double* row = g.data + (i + r) * g.stride + j;
    const double* add = tile_sums + r * kColumns;
    if (columns == kColumns) {
      LORASPAN_UNROLL
      for (int c = 0; c < kColumns; c += L) {
        const Vec<double> sum = g.fresh ? load(add + c) : load(row + c) + load(add + c);
        store(row + c, sum);
        if (g.mirror) store(total + r * kColumns + c, sum);
      }
    } else {
      for (std::int64_t c = 0; c < columns; ++c) total[r * kColumns + c] = row[c] = g.fresh ? add[c] : row[c] + add[c];
    }
  }
  if (!g.mirror) return;
  for (std::int64_t c = 0; c < columns; ++c)
    for (std::int64_t r = max_of(0, j + c - i); r < rows; ++r)
      g.data[(j + c) * g.stride + i + r] = total[r * kColumns + c];
}

template <typename T, int N>
inline void gram_tile(const T* panels, std::int64_t stride, std::int64_t n, std::int64_t i, std::int64_t j,
                      const Sums& g) {
  constexpr int L = kLanes<T>, M = kTileRows;
  alignas(64) double sums[M * N * L];
  if (!g.fresh)
    for (std::int64_t r = 0; r < min_of(M, g.limit - i); ++r)
      for (std::int64_t c = 0; c < N * L; c += 8) __builtin_prefetch(g.data + (i + r) * g.stride + j + c, 1);
  tile<T, M, N, false>(panels + i / L * stride + i % L, stride, panels + j / L * stride, stride, n, sums);
  add_tile<M, N * L>(g, i, j, sums);
}

// The part of the lower triangle in rows [i0, i1) and columns [j0, j1), both from packed panels of n columns of X.
template <typename T>
inline void gram_block(const T* panels, std::int64_t stride, std::int64_t n, std::int64_t i0, std::int64_t i1,
                       std::int64_t j0, std::int64_t j1, const Sums& g) {
  constexpr int L = kLanes<T>, N = kTileVectors;
  for (std::int64_t i = i0; i < i1; i += kTileRows) {
    const std::int64_t end = min_of(j1, round_up(i + kTileRows, L));
    std::int64_t j = j0;
    for (std::int64_t left = (end - j) / L; left > 0;) {
      // four vectors go as two and two: a tile of one is bound by its loads
      const std::int64_t take = left == 4 && N == 3 ? 2 : min_of(left, N);
      if (take == N)
        gram_tile<T, N>(panels, stride, n, i, j, g);
      else if (take == 2)
        gram_tile<T, 2>(panels, stride, n, i, j, g);
      else
        gram_tile<T, 1>(panels, stride, n, i, j, g);
      j += take * L;
      left -= take;
    }
  }
}

inline std::int64_t gram_slab_columns(std::int64_t rows, std::int64_t columns) {
  return slab_columns(columns, max_of(1024, (std::int64_t{1} << 17) / max_of(rows, 1)), 32);
}

// Many rows: chunk by chunk, the threads together.
template <typename T, typename Job>
inline void gram_wide(const Job& job, std::int64_t rows, int threads) {
  constexpr int L = kLanes<T>;
  const std::int64_t padded = round_up(rows, row_unit<T>()), panels = padded / L;
  const std::int64_t stride = kChunk<T> * L + L;
  const std::int64_t blocks = (padded + kBlockRows - 1) / kBlockRows;
  T* packed = scratch<T>(Use::packed, panels * stride);
  for (std::int64_t c = 0; c < job.x.columns || c == 0; c += kChunk<T>) {
    const std::int64_t n = min_of(job.x.columns - c, kChunk<T>);
    parallel_for((panels + 3) / 4, threads, [&](std::int64_t p) {
      pack_panels(job.x, rows, 4 * p, min_of(panels, 4 * p + 4), c, n, packed, stride);
    });
    const Sums g{job.out, rows, rows, c == 0, c + kChunk<T> >= job.x.columns};
    parallel_for(blocks * (blocks + 1) / 2, threads, [&](std::int64_t task) {
      std::int64_t i = 0;
      while (task > i) task -= ++i;
      gram_block(packed, stride, n, i * kBlockRows, min_of(padded, (i + 1) * kBlockRows), task * kBlockRows,
                 min_of(padded, (task + 1) * kBlockRows), g);
    });
  }
}

// Jobs of few rows, all slabs of all of them at once.
template <typename T, typename Job>
inline void gram_narrow(const Job* jobs, std::int64_t count, int threads) {
  run_slabs(
      count, threads,
      [&](std::int64_t job) {
        const std::int64_t columns = jobs[job].x.columns, rows = row_count(jobs[job].x);
        return plan_slabs(columns, gram_slab_columns(rows, columns), 0, dot_sums(rows));
      },
      [&](std::int64_t job, const SlabRun& run) {
        const auto& x = jobs[job].x;
        const std::int64_t rows = row_count(x), width = gram_slab_columns(rows, x.columns);
        if (has_few_rows_in_columns<T>(x))
          column_slabs(x, width, run.first, run.last, run.sums);
        else
          dot_slabs<T>(x, rows, width, run.first, run.last, run.sums);
      },
      [&](std::int64_t job, const SlabSums& sums, std::int64_t part, std::int64_t parts) {
        finish_dots(row_count(jobs[job].x), sums, part, parts, jobs[job].out);
      });
}

template <typename T, typename Job>
inline void gram_all(const Job* jobs, std::int64_t count, int threads) {
  for (std::int64_t begin = 0, end; begin < count; begin = end) {
    for (end = begin; end < count && row_count(jobs[end].x) <= kSlabRows;) ++end;
    if (end > begin)
      gram_narrow<T>(jobs + begin, end - begin, threads);
    else
      gram_wide<T>(jobs[end++], row_count(jobs[begin].x), threads);
  }
}

#if defined(__AVX512BF16__)
struct PairJob {
  PairRows x;
  double* out;
};

inline bool has_pairs(const Rows& x) {
  for (std::int64_t b = 0; b < x.count; ++b)
    if (x.blocks[b].dtype != Dtype::bf16) return false;
  return true;
}

// Of bfloat16 matrices; those in which pairs lose an entry once more without them.
inline void gram_pairs(const GramJob* jobs, std::int64_t count, int threads) {
  PairJob* pairs = scratch<PairJob>(Use::pairs, count);
  bool* lost = scratch<bool>(Use::lost, count);
  for (std::int64_t i = 0; i < count; ++i) {
    const Rows& x = jobs[i].x;
    lost[i] = false;
    pairs[i] = {{{x.blocks, x.count, (x.columns + 1) / 2}, x.columns, lost + i}, jobs[i].out};
  }
  gram_all<Pair>(pairs, count, threads);
  for (std::int64_t i = 0; i < count; ++i)
    if (lost[i]) gram_all<float>(jobs + i, 1, threads);
}
#endif

void gram(const GramJob* jobs, std::int64_t count, Precision precision, int threads) {
  if (precision == Precision::f64) return gram_all<double>(jobs, count, threads);
#if defined(__AVX512BF16__)
  for (std::int64_t begin = 0, end; begin < count; begin = end) {
    const bool in_pairs = has_pairs(jobs[begin].x);
    for (end = begin; end < count && has_pairs(jobs[end].x) == in_pairs;) ++end;
    (in_pairs ? gram_pairs : gram_all<float, GramJob>)(jobs + begin, end - begin, threads);
  }
#else
  gram_all<float>(jobs, count, threads);
#endif
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
