// squares: rows that lie along memory are summed along it, column-major ones a register of rows at a time.
namespace loraspan {
namespace LORASPAN_ISA {

// So many rows of a block are one piece of work.
constexpr std::int64_t kSquaresRows = 16;

template <typename S>
inline double row_squares(const S* p, std::int64_t n) {
  constexpr int L = kLanes<double>, N = 4;
  Vec<double> sums[N] = {};
  std::int64_t i = 0;
  for (; i + N * L <= n; i += N * L) {
    LORASPAN_UNROLL
    for (int q = 0; q < N; ++q) {
      const Vec<double> x = load_as<double>(p + i + q * L);
      sums[q] = x * x + sums[q];
    }
  }
  for (; i + L <= n; i += L) {
    const Vec<double> x = load_as<double>(p + i);
    sums[0] = x * x + sums[0];
  }
  double sum = add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; i < n; ++i) sum += static_cast<double>(widen_entry(p[i])) * static_cast<double>(widen_entry(p[i]));
  return sum;
}

// `count` <= kSquaresRows neighbouring rows at once.
template <typename S>
inline void column_squares(const S* p, std::int64_t col_stride, std::int64_t count, std::int64_t n, double* out) {
  constexpr int L = kLanes<double>, N = static_cast<int>(kSquaresRows) / L;
  Vec<double> sums[N] = {};
  if (count == kSquaresRows) {
    for (std::int64_t c = 0; c < n; ++c) {
      LORASPAN_UNROLL
      for (int q = 0; q < N; ++q) {
        const Vec<double> x = load_as<double>(p + c * col_stride + q * L);
        sums[q] = x * x + sums[q];
      }
    }
    LORASPAN_UNROLL
    for (int q = 0; q < N; ++q) store(out + q * L, sums[q]);
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) out[i] = 0;
  for (std::int64_t c = 0; c < n; ++c)
    for (std::int64_t i = 0; i < count; ++i) {
      const double x = static_cast<double>(widen_entry(p[c * col_stride + i]));
      out[i] += x * x;
    }
}

// Rows [first, first + count) of one block.
inline void block_squares(const Block& b, std::int64_t columns, std::int64_t first, std::int64_t count, double* out) {
  with_type(b.data, b.dtype, [&](auto* data) {
    auto* p = data + first * b.row_stride;
    if (is_column_major(b)) return column_squares(p, b.col_stride, count, columns, out);
    for (std::int64_t i = 0; i < count; ++i) {
      auto* row = p + i * b.row_stride;
      if (b.col_stride == 1) {
        out[i] = row_squares(row, columns);
        continue;
      }
      out[i] = 0;
      for (std::int64_t c = 0; c < columns; ++c) {
        const double x = static_cast<double>(widen_entry(row[c * b.col_stride]));
        out[i] += x * x;
      }
    }
  });
}

void squares(const SquaresJob* jobs, std::int64_t count, int threads) {
  for (std::int64_t job = 0; job < count; ++job) {
    const Rows& x = jobs[job].x;
    double* out = jobs[job].out;
    for (std::int64_t block = 0; block < x.count; ++block) {
      const Block& b = x.blocks[block];
      parallel_for((b.rows + kSquaresRows - 1) / kSquaresRows, threads, [&](std::int64_t task) {
        const std::int64_t first = task * kSquaresRows;
        block_squares(b, x.columns, first, min_of(kSquaresRows, b.rows - first), out + first);
      });
      out += b.rows;
    }
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
