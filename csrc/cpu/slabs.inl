// A batch of jobs cut into slabs of columns: threads take slabs of all jobs, and each job's slabs are added in order.
namespace loraspan {
namespace LORASPAN_ISA {

// A job's slabs: how many, and how many float64 sums each of them leaves.
struct Slabs {
  std::int64_t count;
  std::int64_t sums;
  std::int64_t first;  // among the tasks of its wave, each a run of slabs
  double* data;        // the sums of its slabs one after the other; null where there is one slab only
};

// Memory for sums that one wave of jobs may take.
constexpr std::int64_t kWaveBytes = std::int64_t{64} << 20;
constexpr std::int64_t kFinishParts = 8;
// So many sums are half of a second cache.
constexpr std::int64_t kNearSums = std::int64_t{1} << 16;

inline std::int64_t slab_columns(std::int64_t columns, std::int64_t least, std::int64_t most_slabs) {
  return round_up(max_of(least, (columns + most_slabs - 1) / most_slabs), 512);
}

inline std::int64_t slabs_of(std::int64_t columns, std::int64_t width) {
  return max_of(1, (columns + width - 1) / width);
}

// Jobs up to `end` whose slabs are computed together. A task is a run of a job's slabs, four tasks a thread: a slab
// that follows another can be brought near before its turn.
struct Wave {
  std::int64_t end;
  std::int64_t slabs;
  std::int64_t run;
  std::int64_t tasks;
};

// Adds rows [first, last) of all slabs, `stride` sums apart, in order: `width` of the `row` sums of each go to out.
inline void add_slabs(std::int64_t slabs, const double* sums, std::int64_t stride, std::int64_t row, std::int64_t width,
                      std::int64_t first, std::int64_t last, double* out) {
  for (std::int64_t i = first; i < last; ++i) {
    double* to = out + i * width;
    for (std::int64_t c = 0; c < width; ++c) to[c] = 0;
    for (std::int64_t slab = 0; slab < slabs; ++slab) {
      const double* from = sums + slab * stride + i * row;
      for (std::int64_t c = 0; c < width; ++c) to[c] += from[c];
    }
  }
}

// The jobs that follow `begin` and whose sums fit a wave, at least one of them; places their sums.
inline Wave plan_wave(Slabs* plan, std::int64_t begin, std::int64_t count, int threads) {
  Wave wave{begin, 0, 1, 0};
  std::int64_t sums = 0;
  for (; wave.end < count; ++wave.end) {
    const Slabs& job = plan[wave.end];
    const std::int64_t more = job.count > 1 ? job.count * job.sums : 0;
    if (wave.end > begin && (sums + more) * 8 > kWaveBytes) break;
    wave.slabs += job.count;
    sums += more;
  }
  wave.run = max_of(1, wave.slabs / (4 * threads));
  double* data = scratch<double>(Use::sums, sums);
  for (std::int64_t job = begin; job < wave.end; ++job) {
    plan[job].first = wave.tasks;
    wave.tasks += (plan[job].count + wave.run - 1) / wave.run;
    plan[job].data = plan[job].count > 1 ? data : nullptr;
    if (plan[job].count > 1) data += plan[job].count * plan[job].sums;
  }
  return wave;
}

// The jobs one after another by one thread: the sums of a few slabs are added as soon as they are there, and stay near.
template <typename Run, typename Finish>
inline void run_alone(const Slabs* plan, std::int64_t count, const Run& run, const Finish& finish) {
  for (std::int64_t job = 0; job < count; ++job) {
    const std::int64_t slabs = plan[job].count, entries = plan[job].sums;
    const std::int64_t some = min_of(slabs, max_of(1, kNearSums / max_of(entries, 1)));
    double* sums = scratch<double>(Use::tile, some * entries);
    if (some == slabs) {
      run(job, 0, slabs, sums);
      finish(job, slabs, sums, 0, 1);
      continue;
    }
    double* all = scratch<double>(Use::sums, entries);
    for (std::int64_t i = 0; i < entries; ++i) all[i] = 0;
    for (std::int64_t first = 0, last; first < slabs; first = last) {
      last = min_of(slabs, first + some);
      run(job, first, last, sums);
      for (std::int64_t slab = 0; slab < last - first; ++slab)
        for (std::int64_t i = 0; i < entries; ++i) all[i] += sums[slab * entries + i];
    }
    finish(job, 1, all, 0, 1);
  }
}

// run(job, first, last, sums) writes the sums of slabs [first, last), one after the other; finish(job, slabs, sums,
// part, parts) adds the slabs of a job, in order, and writes its share of the results.
template <typename Size, typename Run, typename Finish>
inline void run_slabs(std::int64_t count, int threads, const Size& size, const Run& run, const Finish& finish) {
  Slabs* plan = scratch<Slabs>(Use::plan, count);
  for (std::int64_t job = 0; job < count; ++job) plan[job] = size(job);
  if (threads == 1) return run_alone(plan, count, run, finish);
  Wave wave;
  for (std::int64_t begin = 0; begin < count; begin = wave.end) {
    wave = plan_wave(plan, begin, count, threads);
    parallel_for(wave.tasks, threads, [&](std::int64_t task) {
      std::int64_t job = begin, after = wave.end;
      while (after - job > 1) {
        const std::int64_t middle = job + (after - job) / 2;
        (plan[middle].first <= task ? job : after) = middle;
      }
      const Slabs& mine = plan[job];
      const std::int64_t first = (task - mine.first) * wave.run, last = min_of(mine.count, first + wave.run);
      double* sums = mine.data ? mine.data + first * mine.sums : scratch<double>(Use::tile, mine.sums);
      run(job, first, last, sums);
      if (!mine.data) finish(job, 1, sums, 0, 1);
    });
    if (wave.slabs == wave.end - begin) continue;
    parallel_for((wave.end - begin) * kFinishParts, threads, [&](std::int64_t task) {
      const std::int64_t job = begin + task / kFinishParts;
      if (plan[job].data) finish(job, plan[job].count, plan[job].data, task % kFinishParts, kFinishParts);
    });
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
