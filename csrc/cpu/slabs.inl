// A batch of jobs cut into slabs of columns: threads take slabs of all jobs, and each job's slabs are added in order.
namespace loraspan {
namespace LORASPAN_ISA {

// A job's slabs: how many, and how many float64 sums each of them leaves.
struct Slabs {
  std::int64_t count;
  std::int64_t sums;
  std::int64_t first;  // among the slabs of its wave
  double* data;        // the sums of its slabs one after the other; null where there is one slab only
};

// Memory for sums that one wave of jobs may take.
constexpr std::int64_t kWaveBytes = std::int64_t{64} << 20;
constexpr std::int64_t kFinishParts = 8;

inline std::int64_t slab_columns(std::int64_t columns, std::int64_t least, std::int64_t most_slabs) {
  return round_up(max_of(least, (columns + most_slabs - 1) / most_slabs), 512);
}

inline std::int64_t slabs_of(std::int64_t columns, std::int64_t width) {
  return max_of(1, (columns + width - 1) / width);
}

// The jobs that follow `begin` and whose sums fit a wave, at least one of them; places their sums.
inline std::int64_t plan_wave(Slabs* plan, std::int64_t begin, std::int64_t count) {
  std::int64_t end = begin, sums = 0, slabs = 0;
  for (; end < count; ++end) {
    const std::int64_t more = plan[end].count > 1 ? plan[end].count * plan[end].sums : 0;
    if (end > begin && (sums + more) * 8 > kWaveBytes) break;
    plan[end].first = slabs;
    slabs += plan[end].count;
    sums += more;
  }
  double* data = scratch<double>(Use::sums, sums);
  for (std::int64_t job = begin; job < end; ++job) {
    plan[job].data = plan[job].count > 1 ? data : nullptr;
    if (plan[job].count > 1) data += plan[job].count * plan[job].sums;
  }
  return end;
}

// run(job, slab, sums) writes the sums of a slab; finish(job, slabs, sums, part, parts) adds the slabs of a job, in
// order, and writes its share of the results.
template <typename Size, typename Run, typename Finish>
inline void run_slabs(std::int64_t count, int threads, const Size& size, const Run& run, const Finish& finish) {
  Slabs* plan = scratch<Slabs>(Use::plan, count);
  for (std::int64_t job = 0; job < count; ++job) plan[job] = size(job);
  for (std::int64_t begin = 0, end; begin < count; begin = end) {
    end = plan_wave(plan, begin, count);
    const std::int64_t slabs = plan[end - 1].first + plan[end - 1].count;
    parallel_for(slabs, threads, [&](std::int64_t task) {
      std::int64_t job = begin, after = end;
      while (after - job > 1) {
        const std::int64_t middle = job + (after - job) / 2;
        (plan[middle].first <= task ? job : after) = middle;
      }
      const Slabs& mine = plan[job];
      const std::int64_t slab = task - mine.first;
      double* sums = mine.data ? mine.data + slab * mine.sums : scratch<double>(Use::tile, mine.sums);
      run(job, slab, sums);
      if (!mine.data) finish(job, 1, sums, 0, 1);
    });
    if (slabs == end - begin) continue;
    parallel_for((end - begin) * kFinishParts, threads, [&](std::int64_t task) {
      const std::int64_t job = begin + task / kFinishParts;
      if (plan[job].data) finish(job, plan[job].count, plan[job].data, task % kFinishParts, kFinishParts);
    });
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
