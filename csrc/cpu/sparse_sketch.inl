// sparse_sketch: a column of Y is the sum of one column of X out of each block of them, with signs. Lanes are rows.
namespace loraspan {
namespace LORASPAN_ISA {

// Which of some packed columns is added, by its first entry, and with which sign.
struct Pick {
  std::uint32_t place;
  float sign;
};

// Blocks of columns that are packed at once, so that a sum is fetched and put back once for all of them.
constexpr std::int64_t kPickBlocks = 4;
// Float32 sums have so many terms before they are added in float64.
constexpr std::int64_t kPickTerms = 128;

// The first entry of the vector of zeros behind packed columns.
inline std::int64_t zeros_at(std::int64_t columns) { return round_up(columns, kLanes<float>) * kLanes<float>; }

// Picks of all columns: those of a pack of kPickBlocks blocks by quarters, by columns of Y in them, and by blocks.
// Where the last pack has no column they pick the zeros behind it.
inline void draw_picks(const SparseSketchJob& job, Pick* picks) {
  const std::int64_t m = job.width / kQuarters, columns = job.x.columns;
  std::int64_t to[kQuarters] = {}, in_block = 0, block = 0;
  Words lanes{};
  for (int lane = 0; lane < kWordLanes; ++lane) lanes[lane] = static_cast<std::uint64_t>(lane);
  const Pick none = {static_cast<std::uint32_t>(zeros_at(kPickBlocks * m)), 1.0f};
  for (std::int64_t i = 0; i < round_up(columns, kPickBlocks * m) * kQuarters; ++i) picks[i] = none;
  for (std::int64_t j = 0; j < columns; j += kWordLanes) {
    Words words[kQuarters / 2];
    philox_blocks(job.seed, lanes + static_cast<std::uint64_t>(j), 0, kSparseStream, &words[0], &words[1]);
    for (std::int64_t i = 0; i < min_of(kWordLanes, columns - j); ++i) {
      for (std::int64_t q = 0; q < kQuarters; ++q) {
        const std::uint64_t word = words[q / 2][i] >> (q % 2 * 32) & 0xffffffffu;
        if (in_block == 0) to[q] = static_cast<std::int64_t>((word >> 1) * static_cast<std::uint64_t>(m) >> 31);
        picks[(q * m + to[q]) * kPickBlocks + block] = {
            static_cast<std::uint32_t>((block * m + in_block) * kLanes<float>), word & 1 ? -1.0f : 1.0f};
        if (++to[q] == m) to[q] = 0;
      }
      if (++in_block < m) continue;
      in_block = 0;
      if (++block < kPickBlocks) continue;
      block = 0;
      picks += kPickBlocks * job.width;
    }
  }
}

// Adds the picks of one pack to the sums, `width` vectors.
inline void add_picks(const float* packed, const Pick* picks, std::int64_t width, float* sums) {
  for (std::int64_t c = 0; c < width; ++c, picks += kPickBlocks) {
    Vec<float> sum = load(static_cast<const float*>(sums + c * kLanes<float>));
    LORASPAN_UNROLL
    for (int b = 0; b < kPickBlocks; ++b) sum = broadcast(picks[b].sign) * load(packed + picks[b].place) + sum;
    store(sums + c * kLanes<float>, sum);
  }
}

// Rows of one panel, sums of `width` vectors, to rows of Y.
inline void store_panel(const SparseSketchJob& job, std::int64_t first, std::int64_t rows, const float* sums) {
  constexpr int L = kLanes<float>;
  for (std::int64_t c = 0; c < job.width; c += L) {
    Vec<float> v[L];
    LORASPAN_UNROLL
    for (int i = 0; i < L; ++i) v[i] = load(sums + (c + i) * L);
    transpose(v);
    for (std::int64_t i = 0; i < rows; ++i)
      store_first<float>(job.y + (first + i) * job.width + c, v[i], min_of(L, job.width - c));
  }
}

// The `rows` rows from `at` on, the first of which is row `first`, kLanes<float> at most.
inline void sparse_sketch_panel(const SparseSketchJob& job, const Pick* picks, Cursor at, std::int64_t first,
                                std::int64_t rows) {
  constexpr int L = kLanes<float>;
  const std::int64_t columns = job.x.columns, entries = round_up(job.width, L) * L;
  const std::int64_t pack_columns = job.width / kQuarters * kPickBlocks, run = kPickTerms / kPickBlocks * pack_columns;
  float* packed = scratch<float>(Use::packed, zeros_at(pack_columns) + L);
  store(packed + zeros_at(pack_columns), Vec<float>{});
  float* sums = scratch<float>(Use::part, entries);
  double* totals = scratch<double>(Use::sums, entries);
  for (std::int64_t i = 0; i < entries; ++i) totals[i] = 0;
  for (std::int64_t begin = 0; begin < columns; begin += run) {
    for (std::int64_t i = 0; i < entries; ++i) sums[i] = 0;
    for (std::int64_t c = begin; c < min_of(columns, begin + run); c += pack_columns) {
      const std::int64_t n = min_of(pack_columns, columns - c);
      pack_panel(job.x, at, rows, c, n, packed);
      add_picks(packed, picks + c * kQuarters, job.width, sums);
    }
    for (std::int64_t i = 0; i < entries; ++i) totals[i] += static_cast<double>(sums[i]);
  }
  for (std::int64_t i = 0; i < entries; ++i) sums[i] = static_cast<float>(totals[i]);
  store_panel(job, first, rows, sums);
}

void sparse_sketch(const SparseSketchJob* jobs, std::int64_t count, int threads) {
  for (std::int64_t i = 0; i < count; ++i) {
    const SparseSketchJob& job = jobs[i];
    Pick* picks = scratch<Pick>(Use::plan, round_up(job.x.columns, job.width / kQuarters * kPickBlocks) * kQuarters);
    draw_picks(job, picks);
    constexpr std::int64_t L = kLanes<float>;
    const std::int64_t rows = row_count(job.x), panels = (rows + L - 1) / L, tasks = min_of(panels, 4 * threads);
    parallel_for(tasks, threads, [&](std::int64_t task) {
      const std::int64_t first = panels * task / tasks * L, last = min_of(rows, panels * (task + 1) / tasks * L);
      Cursor at = find_row(job.x, first);
      for (std::int64_t row = first; row < last; row += L, at = skip_rows(job.x, at, L))
        sparse_sketch_panel(job, picks, at, row, min_of(L, last - row));
    });
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
