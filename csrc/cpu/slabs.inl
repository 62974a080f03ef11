// A batch of jobs cut into slabs of columns: threads take slabs of all jobs, and each job's slabs are added in order.
namespace loraspan {
namespace LORASPAN_ISA {

// A job's slabs: how many, and how many float64 sums each of them leaves. Slabs of a group follow each other, and their
// sums are added first. So one thread needs memory for a group, and many threads may take slabs of it and need more.
struct Slabs {
  std::int64_t count;
  std::int64_t group;
  std::int64_t sums;
  std::int64_t first;  // among the tasks of its wave, each a run of slabs
  double* data;        // all its sums, one after the other; null where a task has all its slabs

  std::int64_t sets(std::int64_t each) const { return (count + each - 1) / each; }
  std::int64_t kept(std::int64_t each) const { return sets(each) > 1 ? sets(each) * sums : 0; }
};

inline void add_sums(std::int64_t count, const double* from, double* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] += from[i];
}

// Slabs [first, last) of a job, whose sums one thread writes: those of `each` slabs, the first of a group and what
// follows, are added up in one place, `stride` sums from the next.
struct SlabRun {
  std::int64_t first, last;
  std::int64_t each;
  std::int64_t stride;
  double* sums;

  bool begins(std::int64_t slab) const { return (slab - first) % each == 0; }
  double* sums_of(std::int64_t slab) const { return sums + (slab - first) / each * stride; }
};

// Sums that are to be added: `count` of each, `stride` apart. Those of a group are added first.
struct SlabSums {
  const double* data;
  std::int64_t count;
  std::int64_t group;
  std::int64_t stride;

  SlabSums from(std::int64_t entry) const { return {data + entry, count, group, stride}; }

  // kLanes totals from `entry` on.
  Vec<double> total(std::int64_t entry) const {
    Vec<double> all = {};
    for (std::int64_t begin = 0; begin < count; begin += group) {
      const double* p = data + begin * stride + entry;
      Vec<double> sum = load(p);
      for (std::int64_t i = 1; i < min_of(group, count - begin); ++i) sum += load(p + i * stride);
      all = begin == 0 ? sum : all + sum;
    }
    return all;
  }
};

// Memory for sums that one wave of jobs may take.
constexpr std::int64_t kWaveBytes = std::int64_t{64} << 20;
constexpr std::int64_t kFinishParts = 8;
// So many sums are half of a second cache.
constexpr std::int64_t kNearSums = std::int64_t{1} << 16;

inline std::int64_t slab_columns(std::int64_t columns, std::int64_t least, std::int64_t most_slabs) {
  return round_up(max_of(least, (columns + most_slabs - 1) / most_slabs), 512);
}

// A job's slabs of `width` columns. Four groups, if a slab has at most `most` columns: what is added to the sums of a
// group was added up by itself.
inline Slabs plan_slabs(std::int64_t columns, std::int64_t width, std::int64_t most, std::int64_t sums) {
  const std::int64_t count = max_of(1, (columns + width - 1) / width);
  return {count, width <= most ? (count + 3) / 4 : 1, sums, 0, nullptr};
}

// Jobs up to `end` whose slabs are computed together. A task is a run of a job's slabs, four tasks a thread: a slab
// that follows another can be brought near before its turn.
struct Wave {
  std::int64_t end;
  std::int64_t sets;  // of sums
  std::int64_t run;   // of sets
  std::int64_t tasks;
  bool split;  // whether groups have been split into slabs

  std::int64_t each(const Slabs& job) const { return split ? 1 : job.group; }
};

// Adds rows [first, last) of all sums: `width` of the `row` sums of each go to out.
inline void add_slabs(const SlabSums& sums, std::int64_t row, std::int64_t width, std::int64_t first, std::int64_t last,
                      double* out) {
  for (std::int64_t i = first; i < last; ++i)
    for (std::int64_t c = 0; c < width; c += kLanes<double>)
      store_first<double>(out + i * width + c, sums.total(i * row + c), width - c);
}

// The jobs that follow `begin` and whose sums fit a wave, at least one of them.
inline Wave cut_wave(const Slabs* plan, std::int64_t begin, std::int64_t count, bool split) {
  Wave wave{begin, 0, 1, 0, split};
  std::int64_t sums = 0;
  for (; wave.end < count; ++wave.end) {
    const Slabs& job = plan[wave.end];
    sums += job.kept(wave.each(job));
    if (wave.end > begin && sums * 8 > kWaveBytes) break;
    wave.sets += job.sets(wave.each(job));
  }
  return wave;
}

// A wave of jobs, whose groups are split where they are too few for the threads; places their sums.
inline Wave plan_wave(Slabs* plan, std::int64_t begin, std::int64_t count, int threads) {
  Wave wave = cut_wave(plan, begin, count, false);
  if (wave.sets < 2 * threads) wave = cut_wave(plan, begin, count, true);
  wave.run = max_of(1, wave.sets / (4 * threads));
  std::int64_t sums = 0;
  for (std::int64_t job = begin; job < wave.end; ++job) sums += plan[job].kept(wave.each(plan[job]));
  double* data = scratch<double>(Use::sums, sums);
  for (Slabs* job = plan + begin; job < plan + wave.end; ++job) {
    const std::int64_t each = wave.each(*job);
    job->first = wave.tasks;
    wave.tasks += (job->sets(each) + wave.run - 1) / wave.run;
    job->data = job->sets(each) > 1 ? data : nullptr;
    data += job->kept(each);
  }
  return wave;
}

// The jobs one after another by one thread: the sums of a few groups are added as soon as they are there, and stay
// near.
template <typename Run, typename Finish>
inline void run_alone(const Slabs* plan, std::int64_t count, const Run& run, const Finish& finish) {
  for (std::int64_t job = 0; job < count; ++job) {
    const Slabs& mine = plan[job];
    const std::int64_t sets = mine.sets(mine.group), stride = mine.sums;
    const std::int64_t some = min_of(sets, max_of(1, kNearSums / max_of(stride, 1)));
    const auto run_sets = [&](std::int64_t first, std::int64_t last, double* sums) {
      run(job, SlabRun{first * mine.group, min_of(mine.count, last * mine.group), mine.group, stride, sums});
    };
    double* near = scratch<double>(Use::tile, some * stride);
    if (some == sets) {
      run_sets(0, sets, near);
      finish(job, SlabSums{near, sets, 1, stride}, 0, 1);
      continue;
    }
    double* all = scratch<double>(Use::sums, stride);
    run_sets(0, 1, all);
    for (std::int64_t first = 1, last; first < sets; first = last) {
      last = min_of(sets, first + some);
      run_sets(first, last, near);
      for (std::int64_t set = 0; set < last - first; ++set) add_sums(stride, near + set * stride, all);
    }
    finish(job, SlabSums{all, 1, 1, stride}, 0, 1);
  }
}

// run(job, slab_run) writes the sums of a run of slabs; finish(job, slab_sums, part, parts) adds the sums of a job, in
// order, and writes its share of the results.
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
      const std::int64_t each = wave.each(mine), set = (task - mine.first) * wave.run;
      double* sums = mine.data ? mine.data + set * mine.sums : scratch<double>(Use::tile, mine.sums);
      run(job, SlabRun{set * each, min_of(mine.count, (set + wave.run) * each), each, mine.sums, sums});
      if (!mine.data) finish(job, SlabSums{sums, 1, 1, mine.sums}, 0, 1);
    });
    if (wave.sets == wave.end - begin) continue;
    parallel_for((wave.end - begin) * kFinishParts, threads, [&](std::int64_t task) {
      const std::int64_t job = begin + task / kFinishParts;
      const Slabs& mine = plan[job];
      if (mine.data)
        finish(job, SlabSums{mine.data, mine.sets(wave.each(mine)), wave.split ? mine.group : 1, mine.sums},
               task % kFinishParts, kFinishParts);
    });
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
