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

// Lines of memory to bring near, one at a time: runs of `length` lines, `gap` bytes from the end of one to the next. A
// run after the other: memory answers slower where lines are asked of many rows in turns. Addresses are numbers because
// they may lie past what they were made from; nothing reads there.
struct ComingPack {
  std::uintptr_t at, gap;
  std::int64_t lines, length;
  std::int64_t done = 0;  // of a run

  void one() {
    if (lines-- <= 0) return;
    __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
    at += 64;
    if (++done < length) return;
    done = 0;
    at += gap;
  }
};

// Columns [c, c + n) of the L rows from `at` on, if one block has them all and its rows or columns lie along memory.
inline ComingPack coming_pack(const Rows& x, Cursor at, std::int64_t c, std::int64_t n) {
  constexpr std::int64_t L = kLanes<float>;
  if (at.block >= x.count || x.blocks[at.block].rows - at.row < L) return {0, 0, 0, 1};
  const Block& b = x.blocks[at.block];
  const std::int64_t size = entry_bytes(b.dtype);
  const bool by_columns = is_column_major(b);
  if (!by_columns && b.col_stride != 1) return {0, 0, 0, 1};
  // where a run begins within a line, that line is the end of what was packed before
  const auto start = reinterpret_cast<std::uintptr_t>(b.data) +
                     static_cast<std::uintptr_t>((at.row * b.row_stride + c * b.col_stride) * size) + 63;
  const std::int64_t length = max_of(1, (by_columns ? L : n) * size / 64);
  const std::int64_t step = (by_columns ? b.col_stride : b.row_stride) * size;
  return {start, static_cast<std::uintptr_t>(step - length * 64), length * (by_columns ? n : L), length};
}

// Adds the picks of one pack to the sums, `width` vectors, while the next pack is brought near.
inline void add_picks(const float* packed, const Pick* picks, std::int64_t width, ComingPack coming, float* sums) {
  for (std::int64_t c = 0; c < width; ++c, picks += kPickBlocks) {
    coming.one();
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

// The `rows` rows from `at` on, the first of which is row `first`, kLanes<float> at most. `after` come the next.
inline void sparse_sketch_panel(const SparseSketchJob& job, const Pick* picks, Cursor at, Cursor after,
                                std::int64_t first, std::int64_t rows) {
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
      const std::int64_t next = c + pack_columns;
      const ComingPack coming = next < columns ? coming_pack(job.x, at, next, min_of(pack_columns, columns - next))
                                               : coming_pack(job.x, after, 0, min_of(pack_columns, columns));
      add_picks(packed, picks + c * kQuarters, job.width, coming, sums);
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
      for (std::int64_t row = first; row < last; row += L) {
        const Cursor after = skip_rows(job.x, at, L);
        sparse_sketch_panel(job, picks, at, after, row, min_of(L, last - row));
        at = after;
      }
    });
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
