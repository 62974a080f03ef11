namespace loraspan {
namespace LORASPAN_ISA {

// Rows that are packed and used for X^T Q before the next are.
constexpr std::int64_t kPowerRows = 64;
// Rows between two lines that are fetched ahead.
constexpr std::int64_t kFetchRows = 8;

// Adds the products of `rows` packed rows of n columns with the same rows of q to t [n, row_sums], which keeps T.
// Vector v of a row is v * q_stride, v * t_stride on.
template <typename T>
inline void multiply_transposed(const T* strips, std::int64_t strip, const T* q, std::int64_t q_stride,
                                std::int64_t rows, std::int64_t n, std::int64_t vectors_in_all, T* t,
                                std::int64_t t_stride, Ahead ahead) {
  constexpr int L = kLanes<T>;
  for_vectors(vectors_in_all, [&](std::int64_t first, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value, kRows = min_int(kRowsBeside<kVectors>, L);
    for (std::int64_t j = 0; j < n; j += kRows) {
      T* to = t + first * t_stride + j * L;
      Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = load(to + v * t_stride + r * L);
      const Ahead near = {first == 0 && j + kRows <= kPowerRows ? ahead.rows + j : nullptr, ahead.bytes};
      const T* columns = strips + j / L * strip + j % L;
      for (std::int64_t i = 0; i < rows; i += kFetchRows) {
        prefetch_line<kRows>(near, i / kFetchRows);
        sum_along<T, kRows, kVectors>(columns + i * L, strip, q + first * q_stride + i * L, q_stride,
                                      min_of(rows - i, kFetchRows), sum);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(to + v * t_stride + r * L, sum[r][v]);
    }
  });
}

// Columns [first, last), at most kSumColumns of them: t = X_c^T Q, then the sums of all rows += X_c t.
template <typename T>
void power_chunk(const PowerJob& job, const SlabPlan& plan, const T* q, std::int64_t first, std::int64_t last,
                 double* sums) {
  constexpr std::int64_t L = kLanes<T>;
  const std::int64_t n = last - first, row_sums = plan.row_sums, strip = (round_up(plan.rows, kPanelRows) + 1) * L;
  T* strips = scratch<T>(Use::packed, kSumColumns / L * strip);
  const std::int64_t vectors = row_sums / L, t_stride = (kSumColumns + 1) * L, q_stride = (plan.rows + 1) * L;
  T* t = scratch<T>(Use::tile, vectors * t_stride);
  for (std::int64_t i = 0; i < vectors * t_stride; ++i) t[i] = 0;
  Cursor at = find_row(job.x, 0);
  for (std::int64_t i = 0; i < plan.rows; i += kPowerRows) {
    const std::int64_t rows = min_of(plan.rows - i, kPowerRows);
    const Rows rest = {job.x.blocks + at.block, job.x.count - at.block, job.x.columns};
    pack_strips(rest, at.row, rows, first, n, strips + i * L, strip);
    at = skip_rows(job.x, at, rows);
    std::uintptr_t ahead[kPowerRows];
    Cursor next = at;
    for (std::int64_t r = 0; r < kPowerRows; r += kPanelRows) {
      PanelMemory panel;
      locate_panel(job.x, next, &panel);
      for (std::int64_t k = 0; k < kPanelRows; ++k)
        ahead[r + k] = panel.start[k] + static_cast<std::uintptr_t>(first) * panel.step[k];
      next = skip_rows(job.x, next, kPanelRows);
    }
    multiply_transposed(strips + i * L, strip, q + i * L, q_stride, rows, n, vectors, t, t_stride,
                        Ahead{ahead, kSumColumns * entry_bytes(rest.blocks[0].dtype)});
  }
  for (std::int64_t i = 0; i < plan.rows; i += kPanelRows)
    multiply_panel(strips + i * L, strip, t, t_stride, n, sums + i * row_sums, row_sums, Ahead{nullptr, 0});
}

// Entries of T that the packed q [R, width] of a job takes: its vectors, one after the other.
template <typename T>
inline std::int64_t weight_entries(const SlabPlan& plan) {
  return plan.row_sums * (plan.rows + 1);
}

template <typename T>
inline void pack_weights(const PowerJob& job, const SlabPlan& plan, T* to) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t v = 0; v < plan.row_sums / L; ++v)
    for (std::int64_t r = 0; r < plan.rows; ++r)
      store(to + (v * (plan.rows + 1) + r) * L,
            load_first<T>(job.q + r * job.width + v * L, max_of(0, min_of(job.width - v * L, L))));
}

template <typename T>
void power_all(const PowerJob* jobs, SlabPlan* plans, std::int64_t count, int threads) {
  const std::int64_t tasks = place_plans(plans, count);
  std::int64_t entries = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    plans[i].weights = entries;
    entries += weight_entries<T>(plans[i]);
  }
  T* weights = scratch<T>(Use::weights, entries);
  parallel_for(count, threads, [&](std::int64_t i) { pack_weights(jobs[i], plans[i], weights + plans[i].weights); });
  parallel_for(tasks, threads, [&](std::int64_t task) {
    const std::int64_t i = last_not_past(plans, count, task), slab = task - plans[i].first_task;
    double* sums = plans[i].sums + slab * sum_entries(plans[i]);
    for (std::int64_t k = 0; k < sum_entries(plans[i]); ++k) sums[k] = 0;
    const std::int64_t end = min_of(jobs[i].x.columns, (slab + 1) * plans[i].slab_columns);
    for (std::int64_t c = slab * plans[i].slab_columns; c < end; c += kSumColumns)
      power_chunk<T>(jobs[i], plans[i], weights + plans[i].weights, c, min_of(end, c + kSumColumns), sums);
  });
}

void power(const PowerJob* jobs, std::int64_t count, Precision precision, int threads) {
  SlabPlan* plans = scratch<SlabPlan>(Use::basis, count);
  for (std::int64_t i = 0; i < count; ++i) plans[i] = plan_slabs(jobs[i].x, jobs[i].width, 512);
  if (precision == Precision::f32)
    power_all<float>(jobs, plans, count, threads);
  else
    power_all<double>(jobs, plans, count, threads);
  for (std::int64_t i = 0; i < count; ++i) add_slabs(plans[i], jobs[i].width, jobs[i].y, threads);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
