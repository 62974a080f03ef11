// What sketch, power and reconstruct add to the tile: how wide it is, what to fetch meanwhile, and whose task it is.
namespace loraspan {
namespace LORASPAN_ISA {

constexpr int min_int(int a, int b) { return a < b ? a : b; }

// A lone vector takes twice the rows, or its few sums would wait for each other.
template <int kVectors>
constexpr int kRowsBeside = kVectors == 1 ? 2 * kTileRows : kTileRows;

// Memory to bring near while a tile is at work: `bytes` bytes from each address on. Null `rows` for none. Addresses are
// numbers because they may lie past what they were made from; nothing reads there.
struct Ahead {
  const std::uintptr_t* rows;
  std::int64_t bytes;
};

template <int kRows>
inline __attribute__((always_inline)) void prefetch_line(Ahead ahead, std::int64_t line) {
  if (!ahead.rows || line * 64 >= ahead.bytes) return;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
    __builtin_prefetch(reinterpret_cast<const void*>(ahead.rows[r] + static_cast<std::uintptr_t>(line * 64)), 0, 3);
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Cuts `vectors` into tiles of at most kTileVectors, none of them alone if that can be helped, and calls
// body(first vector, a constant of the number of vectors).
template <typename Body>
inline void for_vectors(std::int64_t vectors, const Body& body) {
  for (std::int64_t first = 0; first < vectors;) {
    const std::int64_t left = vectors - first;
    if (left >= 3 && left != 4 && kTileVectors >= 3) {
      body(first, Constant<min_int(3, kTileVectors)>{});
      first += 3;
    } else if (left >= 2) {
      body(first, Constant<2>{});
      first += 2;
    } else {
      body(first, Constant<1>{});
      first += 1;
    }
  }
}

// Which of `count` plans, in the order of their first_task, a task belongs to.
template <typename Plan>
inline std::int64_t last_not_past(const Plan* plans, std::int64_t count, std::int64_t task) {
  std::int64_t low = 0;
  for (std::int64_t high = count; high - low > 1;) {
    const std::int64_t middle = low + (high - low) / 2;
    (plans[middle].first_task <= task ? low : high) = middle;
  }
  return low;
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
