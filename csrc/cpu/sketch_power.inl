namespace loraspan {
namespace LORASPAN_ISA {

// Rows that are packed and used for X^T Q before the next are.
constexpr std::int64_t kPowerRows = 64;

// Adds the products of `rows` packed rows of n columns with the same rows of q to t [n, row_sums], which keeps T.
template <typename T>
inline void multiply_transposed(const T* strips, std::int64_t strip, const T* q, std::int64_t rows, std::int64_t n,
                                T* t, std::int64_t row_sums, const std::uintptr_t* ahead, std::int64_t ahead_bytes) {
  constexpr int L = kLanes<T>;
  for_vectors(row_sums / L, [&](std::int64_t first, auto vectors) {
    constexpr int kVectors = decltype(vectors)::value, kRows = min_int(kRowsBeside<kVectors>, L);
    for (std::int64_t j = 0; j < n; j += kRows) {
      T* to = t + j * row_sums + first * L;
      Vec<T> sum[kRows][kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = load(to + r * row_sums + v * L);
      const Ahead near = {ahead && first == 0 && j + kRows <= kPowerRows ? ahead + j : nullptr, ahead_bytes};
      multiply_tile<1, L>(strips + j / L * strip + j % L, L * L, q + first * L, row_sums, L, rows, near, sum);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(to + r * row_sums + v * L, sum[r][v]);
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
  T* t = scratch<T>(Use::tile, kSumColumns * row_sums);
  for (std::int64_t i = 0; i < kSumColumns * row_sums; ++i) t[i] = 0;
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
    multiply_transposed(strips + i * L, strip, q + i * row_sums, rows, n, t, row_sums, ahead,
                        kSumColumns * entry_bytes(rest.blocks[0].dtype));
  }
  for (std::int64_t i = 0; i < plan.rows; i += kPanelRows)
    multiply_panel(strips + i * L, strip, t, n, sums + i * row_sums, row_sums, Ahead{nullptr, 0});
}

template <typename T>
void power_all(const PowerJob* jobs, SlabPlan* plans, std::int64_t count, int threads) {
  const std::int64_t tasks = place_plans(plans, count);
  std::int64_t weights = 0;
  for (std::int64_t i = 0; i < count; ++i) weights += plans[i].rows * plans[i].row_sums;
  T* q = scratch<T>(Use::weights, weights);
  for (std::int64_t i = 0; i < count; ++i)
    for (std::int64_t r = 0; r < plans[i].rows; ++r)
      for (std::int64_t c = 0; c < plans[i].row_sums; ++c)
        *q++ = c < jobs[i].width ? static_cast<T>(jobs[i].q[r * jobs[i].width + c]) : T{0};
  parallel_for(tasks, threads, [&](std::int64_t task) {
    const std::int64_t i = plan_of_task(plans, count, task), slab = task - plans[i].first_task;
    double* sums = plans[i].sums + slab * sum_entries(plans[i]);
    for (std::int64_t k = 0; k < sum_entries(plans[i]); ++k) sums[k] = 0;
    const T* weight = q;
    for (std::int64_t k = count - 1; k >= i; --k) weight -= plans[k].rows * plans[k].row_sums;
    const std::int64_t end = min_of(jobs[i].x.columns, (slab + 1) * plans[i].slab_columns);
    for (std::int64_t c = slab * plans[i].slab_columns; c < end; c += kSumColumns)
      power_chunk<T>(jobs[i], plans[i], weight, c, min_of(end, c + kSumColumns), sums);
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
