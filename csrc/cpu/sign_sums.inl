// Sums of columns of X under the signs of Omega, without a multiplication: the 16 sums of four columns under all signs
// are made once, and each column of Omega adds the one that its four signs name (the method of the four Russians:
// Arlazarov, Dinic, Kronrod, Faradzev, 1970).
namespace loraspan {
namespace LORASPAN_ISA {

// Rows of X that are summed together: 128 bytes of a column, so that the tables for a word of signs fill 16 KiB.
constexpr int kSignVectors = 128 / kVectorBytes;
template <typename T>
constexpr std::int64_t kSignRows = kSignVectors * kLanes<T>;
constexpr std::int64_t kGroupColumns = 4;
constexpr std::int64_t kGroupSums = 1 << kGroupColumns;
constexpr std::int64_t kWordGroups = kWordColumns / kGroupColumns;

// The columns of a panel that come next, to be brought near some lines at a time: their rows begin at `rows`. Addresses
// are numbers because they may lie past what they were made from; nothing reads there.
template <std::int64_t kRows>
struct ComingColumns {
  std::uintptr_t rows[kRows];
  std::int64_t lines;  // of all rows
  std::int64_t step;   // to ask for at a time
  std::int64_t at = 0;

  void some() {
    for (const std::int64_t stop = min_of(lines, at + step); at < stop; ++at)
      __builtin_prefetch(
          reinterpret_cast<const void*>(rows[at % kRows] + static_cast<std::uintptr_t>(at / kRows * 64)));
  }
};

// The sums of four columns under all signs: vector v of sum `signs` at table + (signs * kSignVectors + v) * L, bit i of
// `signs` set where column i is subtracted. Vector v of column i is at columns + v * stride + i * L.
template <typename T>
inline void fill_table(const T* columns, std::int64_t stride, T* table) {
  constexpr int L = kLanes<T>;
  for (int v = 0; v < kSignVectors; ++v) {
    const T* x = columns + v * stride;
    const Vec<T> a = load(x), b = load(x + L), c = load(x + 2 * L), d = load(x + 3 * L);
    const Vec<T> low[4] = {a + b, b - a, a - b, -a - b}, high[4] = {c + d, d - c, c - d, -c - d};
    LORASPAN_UNROLL
    for (int signs = 0; signs < kGroupSums; ++signs)
      store(table + (signs * kSignVectors + v) * L, low[signs % 4] + high[signs / 4]);
  }
}

// Adds to the sums of each column of Omega what its word of signs picks from the tables of 32 columns of X.
template <typename T>
inline void add_word(const T* tables, const std::uint32_t* words, std::int64_t width, T* sums,
                     ComingColumns<kSignRows<T>>* coming) {
  constexpr std::int64_t L = kLanes<T>, kEntry = kSignRows<T>;
  for (std::int64_t c = 0; c < width; ++c, sums += kEntry) {
    coming->some();
    // shifted right by a group, its low bits say how far its entry is
    const std::uint64_t word = std::uint64_t{words[c * kWordLanes]} * kEntry;
    Vec<T> sum[kSignVectors];
    LORASPAN_UNROLL
    for (int v = 0; v < kSignVectors; ++v) sum[v] = load(static_cast<const T*>(sums + v * L));
    LORASPAN_UNROLL
    for (int g = 0; g < kWordGroups; ++g) {
      const T* entry = tables + g * kGroupSums * kEntry + ((word >> (kGroupColumns * g)) & ((kGroupSums - 1) * kEntry));
      LORASPAN_UNROLL
      for (int v = 0; v < kSignVectors; ++v) sum[v] += load(entry + v * L);
    }
    LORASPAN_UNROLL
    for (int v = 0; v < kSignVectors; ++v) store(sums + v * L, sum[v]);
  }
}

// Adds n <= kSumColumns columns of a panel to its float64 sums, n up to whole words packed and zero past the last one.
// Word w of column c of Omega is at words + word_at(w, c, width). `near` is zero before and after.
template <typename T>
inline void add_columns(const T* panel, std::int64_t n, const std::uint32_t* words, std::int64_t width, T* tables,
                        T* near, double* sums, ComingColumns<kSignRows<T>>* coming) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t c = 0; c < n; c += kWordColumns) {
    for (std::int64_t g = 0; g < kWordGroups; ++g)
      fill_table(panel + (c + g * kGroupColumns) * L, kSumColumns * L, tables + g * kGroupSums * kSignRows<T>);
    add_word(tables, words + word_at(c / kWordColumns, 0, width), width, near, coming);
  }
  for (std::int64_t i = 0; i < width * kSignRows<T>; i += L) {
    flush<true>(sums + i, load(static_cast<const T*>(near + i)));
    store(near + i, Vec<T>{});
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
