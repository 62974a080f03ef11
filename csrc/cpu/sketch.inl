namespace loraspan {
namespace LORASPAN_ISA {

// Where one job's partial sums are: one [round_up(R, kPanelRows), row_sums] float64 matrix per slab of columns. The
// slabs depend on the shape alone, so that neither the threads nor the other jobs change how sums are grouped.
struct SlabPlan {
  std::int64_t first_task;
  std::int64_t rows;
  std::int64_t pieces;  // into which the panels of rows are divided; changes no sum
  std::int64_t slabs;
  std::int64_t slab_columns;
  std::int64_t row_sums;
  double* sums;
};

inline std::int64_t sum_entries(const SlabPlan& plan) { return round_up(plan.rows, kPanelRows) * plan.row_sums; }

// At most 16 slabs, of `least` columns or more, and of so many more that all sums fit 256 MiB or there are but two.
inline SlabPlan plan_slabs(const Rows& x, std::int64_t width, std::int64_t least) {
  SlabPlan plan{};
  plan.rows = row_count(x);
  plan.row_sums = round_up(width, kLanes<float>);
  const std::int64_t room = (std::int64_t{1} << 25) / max_of(1, sum_entries(plan));
  const std::int64_t most = max_of(2, min_of(16, room));
  plan.slab_columns = max_of(least, round_up((x.columns + most - 1) / most, kSumColumns));
  plan.slabs = (x.columns + plan.slab_columns - 1) / plan.slab_columns;
  plan.pieces = 1;
  return plan;
}

// Numbers the tasks, gives every plan its memory, and returns how many tasks there are.
inline std::int64_t place_plans(SlabPlan* plans, std::int64_t count) {
  std::int64_t tasks = 0, entries = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    plans[i].first_task = tasks;
    tasks += plans[i].slabs * plans[i].pieces;
    entries += plans[i].slabs * sum_entries(plans[i]);
  }
  double* sums = scratch<double>(Use::sums, entries);
  for (std::int64_t i = 0; i < count; ++i) {
    plans[i].sums = sums;
    sums += plans[i].slabs * sum_entries(plans[i]);
  }
  return tasks;
}

template <typename T>
void sketch_task(const SketchJob& job, const SlabPlan& plan, std::int64_t slab, std::int64_t piece) {
  constexpr std::int64_t kOmegaBytes = std::int64_t{1} << 18;  // a part of the second-level cache
  const std::int64_t panels = (plan.rows + kPanelRows - 1) / kPanelRows;
  const std::int64_t first_row = panels * piece / plan.pieces * kPanelRows;
  const std::int64_t last_row = min_of(plan.rows, panels * (piece + 1) / plan.pieces * kPanelRows);
  double* sums = plan.sums + slab * sum_entries(plan);
  for (std::int64_t i = first_row * plan.row_sums; i < round_up(last_row, kPanelRows) * plan.row_sums; ++i) sums[i] = 0;
  const std::int64_t fit = kOmegaBytes / max_of(1, plan.row_sums * static_cast<std::int64_t>(sizeof(T)));
  const std::int64_t columns = max_of(kSumColumns, min_of(1024, fit / kSumColumns * kSumColumns));
  const std::int64_t omega_stride = (columns + 1) * kLanes<T>;
  T* omega = scratch<T>(Use::weights, plan.row_sums / kLanes<T> * omega_stride);
  const std::int64_t end = min_of(job.x.columns, (slab + 1) * plan.slab_columns);
  for (std::int64_t c = slab * plan.slab_columns; c < end; c += columns) {
    const std::int64_t stop = min_of(end, c + columns);
    for (std::int64_t j = c; j < stop; j += kSumColumns)
      draw_signs<T>(job.seed, j, min_of(stop - j, kSumColumns), plan.row_sums / kLanes<T>, omega + (j - c) * kLanes<T>,
                    omega_stride);
    add_products<T>(job.x, first_row, last_row, c, stop, omega, omega_stride, sums, plan.row_sums);
  }
}

void sketch(const SketchJob* jobs, std::int64_t count, Precision precision, int threads) {
  SlabPlan* plans = scratch<SlabPlan>(Use::basis, count);
  std::int64_t slabs = 0;
  for (std::int64_t i = 0; i < count; ++i) slabs += (plans[i] = plan_slabs(jobs[i].x, jobs[i].width, 4096)).slabs;
  // four tasks for each thread, if that leaves them 64 rows or more
  for (std::int64_t i = 0; i < count; ++i)
    plans[i].pieces = max_of(1, min_of(plans[i].rows / 64, (4 * threads + slabs - 1) / max_of(1, slabs)));
  const std::int64_t tasks = place_plans(plans, count);
  parallel_for(tasks, threads, [&](std::int64_t task) {
    const std::int64_t i = last_not_past(plans, count, task);
    const std::int64_t slab = (task - plans[i].first_task) / plans[i].pieces;
    const std::int64_t piece = (task - plans[i].first_task) % plans[i].pieces;
    if (precision == Precision::f32)
      sketch_task<float>(jobs[i], plans[i], slab, piece);
    else
      sketch_task<double>(jobs[i], plans[i], slab, piece);
  });
  for (std::int64_t i = 0; i < count; ++i) {
    constexpr std::int64_t kRows = 64;
    const SlabPlan& plan = plans[i];
    parallel_for((plan.rows + kRows - 1) / kRows, threads, [&](std::int64_t part) {
      add_slabs(plan.slabs, plan.sums, sum_entries(plan), plan.row_sums, jobs[i].width, part * kRows,
                min_of(plan.rows, (part + 1) * kRows), jobs[i].y);
    });
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
