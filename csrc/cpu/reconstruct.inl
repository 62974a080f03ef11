namespace loraspan {
namespace LORASPAN_ISA {

// Jobs that share a basis and the type of their sums, which is packed once for all of them.
struct Group {
  std::int64_t first;  // in the order of jobs
  std::int64_t count;
  std::int64_t first_task;
  std::int64_t block_rows;
  bool wide;
  bool lone;
};

// float64 sums where a matrix is float64, or where the scale is no ordinary float32.
inline bool needs_double(const ReconstructJob& job) {
  const double size = job.scale < 0 ? -job.scale : job.scale;
  return job.basis.dtype == Dtype::f64 || job.out.dtype == Dtype::f64 ||
         (job.loadings.data && job.loadings.dtype == Dtype::f64) ||
         (job.scale != 0 && !(size >= 0x1p-126 && size <= 0x1.fffffep127));
}

// Orders jobs by basis: negative, zero or positive.
inline int compare_bases(const ReconstructJob& a, const ReconstructJob& b) {
  const std::uintptr_t data[2] = {reinterpret_cast<std::uintptr_t>(a.basis.data),
                                  reinterpret_cast<std::uintptr_t>(b.basis.data)};
  if (data[0] != data[1]) return data[0] < data[1] ? -1 : 1;
  const auto scales = [](const Matrix& basis) {
    return static_cast<std::int64_t>(reinterpret_cast<std::intptr_t>(basis.scales));
  };
  const auto dtype = [](const Matrix& basis) { return static_cast<std::int64_t>(basis.dtype); };
  constexpr int kKeys = 7;
  const std::int64_t keys[2][kKeys] = {
      {a.m, a.k, a.basis.row_stride, a.basis.col_stride, dtype(a.basis), scales(a.basis), needs_double(a)},
      {b.m, b.k, b.basis.row_stride, b.basis.col_stride, dtype(b.basis), scales(b.basis), needs_double(b)}};
  for (int i = 0; i < kKeys; ++i)
    if (keys[0][i] != keys[1][i]) return keys[0][i] < keys[1][i] ? -1 : 1;
  return 0;
}

// Sorts order[0, count) by merging, equals in their order; precedes(a, b) says that a may stand before b. `spare` is as
// long. Returns where the sorted order is.
template <typename Precedes>
inline std::int64_t* sort_order(std::int64_t count, std::int64_t* order, std::int64_t* spare,
                                const Precedes& precedes) {
  for (std::int64_t width = 1; width < count; width *= 2) {
    for (std::int64_t start = 0; start < count; start += 2 * width) {
      const std::int64_t middle = min_of(start + width, count), stop = min_of(start + 2 * width, count);
      std::int64_t a = start, b = middle;
      for (std::int64_t to = start; to < stop; ++to) {
        const bool left = a < middle && (b == stop || precedes(order[a], order[b]));
        spare[to] = left ? order[a++] : order[b++];
      }
    }
    std::int64_t* sorted = spare;
    spare = order;
    order = sorted;
  }
  return order;
}

inline Block rows_of(const Matrix& a, std::int64_t rows) { return {a.data, rows, a.row_stride, a.col_stride, a.dtype}; }

// Panels of rows [first, first + rows) of a matrix with k columns.
template <typename T>
inline void row_panels(const Matrix& a, std::int64_t k, std::int64_t first, std::int64_t rows, T* panels,
                       std::int64_t stride) {
  constexpr std::int64_t L = kLanes<T>;
  if (is_packed(a.dtype)) return panels_along(columns_of(a), k, first, rows, panels, stride);
  Block block = rows_of(a, rows);
  with_type(a.data, a.dtype, [&](auto* data) { block.data = data + first * a.row_stride; });
  pack_panels<T>({&block, 1, k}, rows, 0, (rows + L - 1) / L, 0, k, panels, stride);
}

// Panel p of the columns of a matrix, of which there are `columns`: their entries [c0, c0 + n), a lane for each.
template <typename T>
inline void column_panel(const Matrix& a, std::int64_t columns, std::int64_t p, std::int64_t c0, std::int64_t n,
                         T* panel) {
  if (is_packed(a.dtype)) return panel_across(columns_of(a), columns, p, c0, n, panel);
  const Block turned = {a.data, columns, a.col_stride, a.row_stride, a.dtype};
  pack_panels<T>({&turned, 1, c0 + n}, columns, p, p + 1, c0, n, panel, 0);
}

// The columns of loadings as panels.
template <typename T>
T* loading_panels(const ReconstructJob& job, std::int64_t panel) {
  constexpr std::int64_t L = kLanes<T>;
  T* panels = scratch<T>(Use::weights, (round_up(job.p, kPlaceColumns) + L - 1) / L * panel);
  for (std::int64_t p = 0; p < (job.p + L - 1) / L; ++p)
    column_panel(job.loadings, job.p, p, 0, job.k, panels + p * panel);
  return panels;
}

// `loadings` [columns, k] packed as panels, times the rows of a basis block, packed as panels too, straight to out.
template <typename T>
void place_products(const ReconstructJob& job, const T* basis, std::int64_t panel, std::int64_t first_row,
                    std::int64_t rows, const T* loadings, bool streams) {
  constexpr std::int64_t L = kLanes<T>;
  alignas(64) T sums[kPlaceColumns * kTileVectors * L];
  for (std::int64_t c = 0; c < job.p; c += kPlaceColumns)
    for_vectors((rows + L - 1) / L, [&](std::int64_t first, auto vectors) {
      constexpr int kVectors = decltype(vectors)::value, kRows = kRowsBeside<kVectors>;
      const std::int64_t columns = min_of(job.p - c, kPlaceColumns);
      for (std::int64_t i = 0; i < columns; i += kRows) {
        Vec<T> sum[kRows][kVectors] = {};
        sum_along<T, kRows, kVectors>(loadings + (c + i) / L * panel + (c + i) % L, panel, basis + first * panel, panel,
                                      job.k, sum);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) store(sums + ((i + r) * kTileVectors + v) * L, sum[r][v]);
      }
      const Tile<T> tile = {sums, L, kTileVectors * L, min_of(rows - first * L, kVectors * L), columns, streams};
      place(tile, static_cast<T>(job.scale), job.out, first_row + first * L, c);
    });
}

template <typename T>
void reconstruct_block(const ReconstructJob* jobs, const std::int64_t* order, const Group& group,
                       std::int64_t first_row, bool streams) {
  constexpr std::int64_t L = kLanes<T>;
  const ReconstructJob& any = jobs[order[group.first]];
  const std::int64_t rows = min_of(any.m - first_row, group.block_rows), k = any.k, panel = (k + 1) * L;
  const std::int64_t panels = (rows + L - 1) / L;
  if (group.lone) {
    reconstruct_lone<T>(any, loading_panels<T>(any, panel), panel, first_row, rows, streams);
    if (streams) stream_fence();
    return;
  }
  T* basis = scratch<T>(Use::basis, panels * panel);
  row_panels(any.basis, k, first_row, rows, basis, panel);
  for (std::int64_t i = 0; i < group.count; ++i) {
    const ReconstructJob& job = jobs[order[group.first + i]];
    if (!job.loadings.data) {
      for (std::int64_t c = 0; c < job.p; c += kPlaceColumns)
        place(Tile<T>{basis + c * L, panel, L, rows, min_of(job.p - c, kPlaceColumns), streams},
              static_cast<T>(job.scale), job.out, first_row, c);
      continue;
    }
    place_products(job, basis, panel, first_row, rows, loading_panels<T>(job, panel), streams);
  }
  if (streams) stream_fence();
}

// Groups of jobs and blocks of rows, of at most 192 KiB of basis and so few rows that every thread has four tasks. A
// lone job keeps no block of its basis: the longer its runs of rows, the better they are fetched ahead.
inline std::int64_t make_groups(const ReconstructJob* jobs, const std::int64_t* order, std::int64_t count, int threads,
                                Group* groups, std::int64_t* tasks) {
  constexpr std::int64_t kUnit = 2 * kTileVectors * kLanes<float>;
  std::int64_t found = 0, all_rows = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const ReconstructJob& job = jobs[order[i]];
    if (i > 0 && compare_bases(job, jobs[order[i - 1]]) == 0) {
      ++groups[found - 1].count;
      continue;
    }
    groups[found++] = {i, 1, 0, 0, needs_double(job), false};
    all_rows += job.m;
  }
  *tasks = 0;
  for (std::int64_t g = 0; g < found; ++g) {
    const ReconstructJob& job = jobs[order[groups[g].first]];
    groups[g].lone = groups[g].count == 1 && is_lone(job, groups[g].wide ? kLanes<double> : kLanes<float>);
    const std::int64_t fit = min_of(1024, (std::int64_t{192} << 10) / (4 * (job.k + 1)));
    const std::int64_t rows = min_of(groups[g].lone ? 2048 + kUnit : fit, all_rows / (4 * threads));
    groups[g].block_rows = max_of(kUnit, rows / kUnit * kUnit);
    groups[g].first_task = *tasks;
    *tasks += (job.m + groups[g].block_rows - 1) / groups[g].block_rows;
  }
  return found;
}

// Whether all outputs together are more than what a cache can hold for whoever reads them next.
inline bool exceed_caches(const ReconstructJob* jobs, std::int64_t count) {
  constexpr std::int64_t kCaches = std::int64_t{1} << 27;
  std::int64_t bytes = 0;
  for (std::int64_t i = 0; i < count; ++i) bytes += jobs[i].m * jobs[i].p * entry_bytes(jobs[i].out.dtype);
  return bytes > kCaches;
}

void reconstruct(const ReconstructJob* jobs, std::int64_t count, int threads) {
  const bool streams = exceed_caches(jobs, count);
  std::int64_t* order = scratch<std::int64_t>(Use::sums, 2 * count);
  for (std::int64_t i = 0; i < count; ++i) order[i] = i;
  order = sort_order(count, order, order + count,
                     [&](std::int64_t a, std::int64_t b) { return compare_bases(jobs[a], jobs[b]) <= 0; });
  Group* groups = scratch<Group>(Use::packed, count);
  std::int64_t tasks = 0;
  const std::int64_t found = make_groups(jobs, order, count, threads, groups, &tasks);
  parallel_for(tasks, threads, [&](std::int64_t task) {
    const Group& group = groups[last_not_past(groups, found, task)];
    const std::int64_t first_row = (task - group.first_task) * group.block_rows;
    if (group.wide)
      reconstruct_block<double>(jobs, order, group, first_row, streams);
    else
      reconstruct_block<float>(jobs, order, group, first_row, streams);
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
