// The inner product of sketch, power and reconstruct: entries of one operand against vectors of the other.
namespace loraspan {
namespace LORASPAN_ISA {

// Rows x vectors of sums that fit the registers beside their operands. Without fused multiply-add the products need
// registers too.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kSumRows = 8, kSumVectors = 3;
#elif defined(__AVX2__)
constexpr int kSumRows = 4, kSumVectors = 3;
#else
constexpr int kSumRows = 4, kSumVectors = 2;
#endif

// A lone vector takes twice the rows, or its few sums would wait for each other.
template <int kVectors>
constexpr int kRowsBeside = kVectors == 1 ? 2 * kSumRows : kSumRows;

constexpr int min_int(int a, int b) { return a < b ? a : b; }

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
    __builtin_prefetch(reinterpret_cast<const void*>(ahead.rows[r] + static_cast<std::uintptr_t>(line * 64)), 0, 2);
}

// sum[r][v] += a(r, k) * b(k, v) for k in [0, n), in that order. With L = kLanes<T>, a(r, k) is the entry at
// a + (k / L) * a_jump + (k % L) * kStep + r * kRowStride, and b(k, v) the vector at b + k * b_step + v * b_vector.
template <int kRowStride, int kStep, typename T, int kRows, int kVectors>
inline __attribute__((always_inline)) void multiply_tile(const T* a, std::int64_t a_jump, const T* b,
                                                         std::int64_t b_step, std::int64_t b_vector, std::int64_t n,
                                                         Ahead ahead, Vec<T> (&sum)[kRows][kVectors]) {
  constexpr std::int64_t L = kLanes<T>;
  for (std::int64_t start = 0; start < n; start += L) {
    prefetch_line<kRows>(ahead, start / L);
    const std::int64_t stop = n - start < L ? n - start : L;
    for (std::int64_t k = 0; k < stop; ++k) {
      Vec<T> row[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) row[v] = load(b + v * b_vector);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec<T> x = broadcast(a[k * kStep + r * kRowStride]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] += x * row[v];
      }
      b += b_step;
    }
    a += a_jump;
  }
}

// y += sum in float64.
inline void add_wide(double* y, Vec<float> sum) {
  store(y, load(y) + widen(low_half(sum)));
  store(y + kLanes<double>, load(y + kLanes<double>) + widen(high_half(sum)));
}

inline void add_wide(double* y, Vec<double> sum) { store(y, load(y) + sum); }

// Cuts `vectors` into tiles of at most kSumVectors, none of them alone if that can be helped, and calls
// body(first vector, a constant of the number of vectors).
template <int N>
struct Constant {
  static constexpr int value = N;
};

template <typename Body>
inline void for_vectors(std::int64_t vectors, const Body& body) {
  for (std::int64_t first = 0; first < vectors;) {
    const std::int64_t left = vectors - first;
    if (left >= 3 && left != 4 && kSumVectors >= 3) {
      body(first, Constant<min_int(3, kSumVectors)>{});
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

}  // namespace LORASPAN_ISA
}  // namespace loraspan
