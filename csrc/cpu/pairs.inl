// Packing in pairs: two neighbouring bfloat16 entries of a row are one lane, so a vector of them takes part in twice as
// many products. Panels and strips are those of pack.inl, with pairs for entries; the last of an odd number has a zero.
#if defined(__AVX512BF16__)
namespace loraspan {
namespace LORASPAN_ISA {

// X in pairs of columns, of which `columns` counts the pairs.
struct PairRows : Rows {
  std::int64_t entries;  // columns of X
  bool* lost;            // set once an entry is subnormal, which products of pairs take for zero
};

// Loads pairs, and remembers whether any entry was subnormal.
struct PairLoader {
  typedef std::uint16_t Words __attribute__((vector_size(kVectorBytes), may_alias));
  Words least = ~Words{};

  Bits seen(Bits pairs) {
    // without its sign a subnormal number is 1 to 0x7f: doubled and less one it is below 0xff, and zero is not
    const Words words = reinterpret_cast<Words>(pairs), sizes = words + words - 1;
    least = sizes < least ? sizes : least;
    return pairs;
  }

  // The first n entries of a row from p on, at most all that fit a vector.
  Bits along(const Bfloat* p, std::int64_t n) {
    const __mmask32 mask = n >= 2 * kLanes<Pair> ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    return seen(reinterpret_cast<Bits>(_mm512_maskz_loadu_epi16(mask, p)));
  }

  // One pair of columns, `step` apart, of which the second may be missing: rows from p on to lanes [lane, lane +
  // count).
  Bits across(const Bfloat* p, std::int64_t step, bool both, std::int64_t lane, std::int64_t count) {
    const __mmask16 mask = static_cast<__mmask16>(((1u << count) - 1u) << lane);
    const auto column = [&](const Bfloat* rows) {
      const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(rows) - static_cast<std::uintptr_t>(2 * lane);
      return widen(reinterpret_cast<Shorts>(_mm256_maskz_loadu_epi16(mask, reinterpret_cast<const void*>(at))));
    };
    return seen(both ? column(p) | column(p + step) << 16 : column(p));
  }

  void report(const PairRows& x) const {
    bool lost = false;
    for (int i = 0; i < 2 * kLanes<Pair>; ++i) lost |= least[i] < 0xff;
    if (lost) __atomic_store_n(x.lost, true, __ATOMIC_RELAXED);
  }
};

inline const Bfloat* entry_at(const Block& b, std::int64_t row, std::int64_t column) {
  return static_cast<const Bfloat*>(b.data) + row * b.row_stride + column * b.col_stride;
}

// Adds rows that do not lie along memory, `count` from `row` on, to lanes from `lane` on of `pairs` pairs from k on.
inline void add_across(PairLoader& loader, const PairRows& x, const Block& b, std::int64_t row, std::int64_t count,
                       std::int64_t k, std::int64_t pairs, std::int64_t lane, Bits* v) {
  const std::int64_t height = b.row_stride == 1 ? count : 1;
  for (std::int64_t i = 0; i < count; i += height)
    for (std::int64_t q = 0; q < pairs; ++q)
      v[q] |=
          loader.across(entry_at(b, row + i, 2 * (k + q)), b.col_stride, 2 * (k + q) + 1 < x.entries, lane + i, height);
}

// Pairs [c0, c0 + n) of the rows from `at` on, of which `rows` exist, to one panel.
inline void pack_panel(const PairRows& x, Cursor at, std::int64_t rows, std::int64_t c0, std::int64_t n, Pair* panel) {
  constexpr int L = kLanes<Pair>;
  PairLoader loader;
  const Bfloat* along[L] = {};
  Cursor cursor = at;
  for (std::int64_t lane = 0; lane < rows; ++cursor.row) {
    while (cursor.row >= x.blocks[cursor.block].rows) cursor = {cursor.block + 1, 0};
    const Block& b = x.blocks[cursor.block];
    if (b.col_stride == 1) along[lane] = entry_at(b, cursor.row, 0);
    ++lane;
  }
  for (std::int64_t k = c0; k < c0 + n; k += L) {
    const std::int64_t pairs = min_of(c0 + n - k, L);
    Bits v[L];
    LORASPAN_UNROLL
    for (int i = 0; i < L; ++i) {
      if (along[i]) __builtin_prefetch(along[i] + 2 * k + 2 * kLineColumns);
      v[i] = along[i] ? loader.along(along[i] + 2 * k, x.entries - 2 * k) : Bits{};
    }
    transpose(v);
    cursor = at;
    for (std::int64_t lane = 0; lane < rows; cursor = {cursor.block + 1, 0}) {
      const Block& b = x.blocks[cursor.block];
      const std::int64_t count = min_of(rows - lane, b.rows - cursor.row);
      if (b.col_stride != 1) add_across(loader, x, b, cursor.row, count, k, pairs, lane, v);
      lane += count;
    }
    for (std::int64_t i = 0; i < pairs; ++i) store(panel + (k - c0 + i) * L, v[i]);
  }
  loader.report(x);
}

inline void pack_panels(const PairRows& x, std::int64_t rows, std::int64_t first, std::int64_t last, std::int64_t c0,
                        std::int64_t n, Pair* panels, std::int64_t stride) {
  constexpr std::int64_t L = kLanes<Pair>;
  for (std::int64_t p = first; p < last; ++p)
    pack_panel(x, find_row(x, p * L), max_of(0, min_of(rows - p * L, L)), c0, n, panels + p * stride);
}

// Pairs [c0, c0 + n) of rows [i0, i0 + rows) as strips; row i0 goes to strips[0].
inline void pack_strips(const PairRows& x, std::int64_t i0, std::int64_t rows, std::int64_t c0, std::int64_t n,
                        Pair* strips, std::int64_t stride) {
  constexpr std::int64_t L = kLanes<Pair>;
  PairLoader loader;
  Cursor at = find_row(x, i0);
  for (std::int64_t done = 0, count; done < rows; done += count, at = {at.block + 1, 0}) {
    const Block& b = x.blocks[at.block];
    count = min_of(rows - done, b.rows - at.row);
    for (std::int64_t i = 0, height; i < count; i += height) {
      Pair* out = strips + (done + i) * L;
      if (b.col_stride == 1) {
        const Bfloat* row = entry_at(b, at.row + i, 2 * c0);
#pragma GCC unroll 4
        for (std::int64_t k = 0; k < n; k += L, out += stride)
          store(out, loader.along(row + 2 * k, x.entries - 2 * (c0 + k)));
        height = 1;
        continue;
      }
      height = min_of(count - i, L);
      for (std::int64_t k = 0; k < n; k += L, out += stride) {
        Bits v[L] = {};
        add_across(loader, x, b, at.row + i, height, c0 + k, min_of(n - k, L), 0, v);
        transpose(v);
        for (std::int64_t row = 0; row < height; ++row) store(out + row * L, v[row]);
      }
    }
  }
  loader.report(x);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
#endif
