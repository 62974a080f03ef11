// sketch: Y = X Omega, by panels of rows of X and slabs of its columns.
namespace loraspan {
namespace LORASPAN_ISA {

// Where one job's partial sums are: for each slab of columns, panels of kSignRows rows, in them a column of Omega after
// the other. The slabs depend on the shape alone, so that neither the threads nor the other jobs change how sums are
// grouped.
struct SlabPlan {
  std::int64_t first_task;
  std::int64_t rows;
  std::int64_t pieces;  // into which the panels of rows are divided; changes no sum
  std::int64_t slabs;
  std::int64_t slab_columns;
  std::int64_t sum_entries;  // of a slab
  double* sums;
};

// At most 16 slabs, of 4096 columns or more, and of so many more that all sums fit 256 MiB or there are but two.
template <typename T>
inline SlabPlan plan_slabs(const SketchJob& job) {
  SlabPlan plan{};
  plan.rows = row_count(job.x);
  plan.sum_entries = round_up(plan.rows, kSignRows<T>) * job.width;
  const std::int64_t room = (std::int64_t{1} << 25) / max_of(1, plan.sum_entries);
  const std::int64_t most = max_of(2, min_of(16, room));
  plan.slab_columns = max_of(4096, round_up((job.x.columns + most - 1) / most, kSumColumns));
  plan.slabs = (job.x.columns + plan.slab_columns - 1) / plan.slab_columns;
  plan.pieces = 1;
  return plan;
}

// Numbers the tasks, gives every plan its memory, and returns how many tasks there are.
inline std::int64_t place_plans(SlabPlan* plans, std::int64_t count) {
  std::int64_t tasks = 0, entries = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    plans[i].first_task = tasks;
    tasks += plans[i].slabs * plans[i].pieces;
    entries += plans[i].slabs * plans[i].sum_entries;
  }
  double* sums = scratch<double>(Use::sums, entries);
  for (std::int64_t i = 0; i < count; ++i) {
    plans[i].sums = sums;
    sums += plans[i].slabs * plans[i].sum_entries;
  }
  return tasks;
}

// Columns [first, last) of some panels of rows, and the signs of these columns.
struct SketchPart {
  const SketchJob& job;
  std::int64_t first, last;
  const std::uint32_t* words;
};

// Adds a panel of rows, which begins at `at` and of which `rows` rows exist, to its sums; `after` is where the next one
// begins.
template <typename T>
inline void add_panel(const SketchPart& part, Cursor at, std::int64_t rows, Cursor after, double* sums) {
  constexpr std::int64_t L = kLanes<T>, kRows = kSignRows<T>;
  const Rows& x = part.job.x;
  const std::int64_t width = part.job.width;
  T* packed = scratch<T>(Use::packed, kSumColumns * kRows);
  T* tables = scratch<T>(Use::tile, kWordGroups * kGroupSums * kRows);
  T* near = scratch<T>(Use::part, width * kRows);
  for (std::int64_t i = 0; i < width * kRows; ++i) near[i] = 0;
  PanelMemory<kRows> memory;
  locate_panel(x, at, &memory);
  for (std::int64_t c = part.first; c < part.last; c += kSumColumns) {
    const std::int64_t n = min_of(part.last - c, kSumColumns);
    pack_group<kRows>(x, at, rows, c, n, packed);
    for (std::int64_t i = n * L; i < round_up(n, kWordColumns) * L; ++i)
      for (int v = 0; v < kSignVectors; ++v) packed[v * kSumColumns * L + i] = 0;
    std::int64_t next = c + kSumColumns;
    if (next >= part.last) locate_panel(x, after, &memory), next = part.first;
    ComingColumns<kRows> coming;
    for (int r = 0; r < kRows; ++r)
      coming.rows[r] = memory.start[r] + static_cast<std::uintptr_t>(next) * memory.step[r];
    // columns along memory lie one after the other, and the hardware fetches ahead
    const Block& block = x.blocks[at.block];
    coming.lines = is_column_major(block) ? 0 : kRows * kSumColumns * entry_bytes(block.dtype) / 64;
    coming.step = coming.lines / max_of(1, n / kWordColumns * width) + 1;
    add_columns(packed, n, part.words + word_at((c - part.first) / kWordColumns, 0, width), width, tables, near, sums,
                &coming);
  }
}

// A slab's columns, in so few at a time that their signs stay near, of a piece of its rows.
template <typename T>
void sketch_task(const SketchJob& job, const SlabPlan& plan, std::int64_t slab, std::int64_t piece) {
  constexpr std::int64_t kRows = kSignRows<T>, kSigns = std::int64_t{1} << 20, kLeast = kWordColumns * kWordLanes;
  const std::int64_t panels = (plan.rows + kRows - 1) / kRows, first = panels * piece / plan.pieces;
  const std::int64_t last = panels * (piece + 1) / plan.pieces, panel_sums = kRows * job.width;
  double* sums = plan.sums + slab * plan.sum_entries;
  for (std::int64_t i = first * panel_sums; i < last * panel_sums; ++i) sums[i] = 0;
  const std::int64_t columns = max_of(kSumColumns, kSigns / max_of(1, job.width) / kLeast * kLeast);
  const std::int64_t end = min_of(job.x.columns, (slab + 1) * plan.slab_columns);
  for (std::int64_t c = slab * plan.slab_columns; c < end; c += columns) {
    const std::int64_t stop = min_of(end, c + columns), count = (stop - c + kWordColumns - 1) / kWordColumns;
    std::uint32_t* words = scratch<std::uint32_t>(Use::weights, round_up(count, kWordLanes) * job.width);
    draw_signs(job.seed, c, count, job.width, words);
    Cursor at = find_row(job.x, first * kRows);
    for (std::int64_t p = first; p < last; ++p) {
      const Cursor after = skip_rows(job.x, at, kRows);
      add_panel<T>({job, c, stop, words}, at, min_of(plan.rows - p * kRows, kRows), after, sums + p * panel_sums);
      at = after;
    }
  }
}

// Adds the slabs of a panel of rows, in order, and writes its rows of Y.
template <typename T>
void finish_panel(const SketchJob& job, const SlabPlan& plan, std::int64_t panel) {
  constexpr std::int64_t kRows = kSignRows<T>;
  for (std::int64_t i = 0; i < min_of(plan.rows - panel * kRows, kRows); ++i)
    for (std::int64_t c = 0; c < job.width; ++c) {
      const double* from = plan.sums + (panel * job.width + c) * kRows + i;
      double sum = 0;
      for (std::int64_t slab = 0; slab < plan.slabs; ++slab) sum += from[slab * plan.sum_entries];
      job.y[(panel * kRows + i) * job.width + c] = sum;
    }
}

template <typename T>
void sketch_all(const SketchJob* jobs, std::int64_t count, int threads) {
  SlabPlan* plans = scratch<SlabPlan>(Use::basis, count);
  std::int64_t slabs = 0;
  for (std::int64_t i = 0; i < count; ++i) slabs += (plans[i] = plan_slabs<T>(jobs[i])).slabs;
  // four tasks for each thread, if that leaves them 64 rows or more
  for (std::int64_t i = 0; i < count; ++i)
    plans[i].pieces = max_of(1, min_of(plans[i].rows / 64, (4 * threads + slabs - 1) / max_of(1, slabs)));
  const std::int64_t tasks = place_plans(plans, count);
  parallel_for(tasks, threads, [&](std::int64_t task) {
    const std::int64_t i = last_not_past(plans, count, task), mine = task - plans[i].first_task;
    sketch_task<T>(jobs[i], plans[i], mine / plans[i].pieces, mine % plans[i].pieces);
  });
  for (std::int64_t i = 0; i < count; ++i)
    parallel_for((plans[i].rows + kSignRows<T> - 1) / kSignRows<T>, threads,
                 [&](std::int64_t panel) { finish_panel<T>(jobs[i], plans[i], panel); });
}

void sketch(const SketchJob* jobs, std::int64_t count, Precision precision, int threads) {
  if (precision == Precision::f32)
    sketch_all<float>(jobs, count, threads);
  else
    sketch_all<double>(jobs, count, threads);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
