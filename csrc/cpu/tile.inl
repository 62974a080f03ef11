// The innermost products: a tile of M rows by N vectors of sums held in registers.
namespace loraspan {
namespace LORASPAN_ISA {

// M * N accumulators, N vectors of one operand and one broadcast fill the registers of the set.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRows = 8;
constexpr int kTileVectors = 3;
#elif defined(__AVX2__)
constexpr int kTileRows = 4;
constexpr int kTileVectors = 3;
#else
constexpr int kTileRows = 4;
constexpr int kTileVectors = 2;
#endif

// Columns that float32 sums run over before they are added in float64.
constexpr std::int64_t kFlush = 128;

// sums[i][j] += sum over k in [0, n) of a_i[k] * b_j[k]; b_j[k] is the vector at b + j * b_stride + k * L.
//
// Along: a_i[k] is lane i of vector k of the panels at a (lanes past the first L in the next panel, a_stride on).
// Across: a_i[k] is lane k % L of vector i of strip k / L, a_stride from strip to strip.
template <typename T, int M, int N>
inline __attribute__((always_inline)) void sum_along(const T* a, std::int64_t a_stride, const T* b,
                                                     std::int64_t b_stride, std::int64_t n, Sum<T> (&sums)[M][N]) {
  constexpr int L = kLanes<T>;
  for (std::int64_t k = 0; k < n; ++k) {
    Vec<T> v[N];
    LORASPAN_UNROLL
    for (int j = 0; j < N; ++j) v[j] = load(b + j * b_stride + k * L);
    LORASPAN_UNROLL
    for (int i = 0; i < M; ++i) {
      const Vec<T> w = broadcast(a[(i / L) * a_stride + i % L + k * L]);
      LORASPAN_UNROLL
      for (int j = 0; j < N; ++j) sums[i][j] = multiply_add(w, v[j], sums[i][j]);
    }
  }
}

template <typename T, int M, int N>
inline __attribute__((always_inline)) void sum_across(const T* a, std::int64_t a_stride, const T* b,
                                                      std::int64_t b_stride, std::int64_t n, Sum<T> (&sums)[M][N]) {
  constexpr int L = kLanes<T>;
  for (std::int64_t start = 0; start < n; start += L, a += a_stride) {
    const std::int64_t end = n - start < L ? n - start : L;
    for (std::int64_t k = 0; k < end; ++k) {
      Vec<T> v[N];
      LORASPAN_UNROLL
      for (int j = 0; j < N; ++j) v[j] = load(b + j * b_stride + (start + k) * L);
      LORASPAN_UNROLL
      for (int i = 0; i < M; ++i) {
        const Vec<T> w = broadcast(a[i * L + k]);
        LORASPAN_UNROLL
        for (int j = 0; j < N; ++j) sums[i][j] = multiply_add(w, v[j], sums[i][j]);
      }
    }
  }
}

// Adds vector v to the kLanes<T> float64 at p, or puts it there.
template <bool kAdd>
inline void flush(double* p, Vec<float> v) {
  constexpr int L = kLanes<double>;
  const Vec<double> low = widen(low_half(v)), high = widen(high_half(v));
  store(p, kAdd ? load(p) + low : low);
  store(p + L, kAdd ? load(p + L) + high : high);
}

template <bool kAdd>
inline void flush(double* p, Vec<double> v) {
  store(p, kAdd ? load(p) + v : v);
}

// A tile of sums in float64, its row i at sums + i * N * kLanes<T>. `n` products each; float32 ones are flushed.
template <typename T, int M, int N, bool kAcross>
__attribute__((noinline)) void tile(const T* a, std::int64_t a_stride, const T* b, std::int64_t b_stride,
                                    std::int64_t n, double* out) {
  constexpr int L = kLanes<T>;
  const std::int64_t step = sizeof(T) == sizeof(double) ? n : kFlush / kEntries<T>;
  for (std::int64_t start = 0; start == 0 || start < n; start += step) {
    Sum<T> sums[M][N] = {};
    const std::int64_t width = min_of(n - start, step);
    if constexpr (kAcross)
      sum_across<T, M, N>(a + start / L * a_stride, a_stride, b + start * L, b_stride, width, sums);
    else
      sum_along<T, M, N>(a + start * L, a_stride, b + start * L, b_stride, width, sums);
    LORASPAN_UNROLL
    for (int i = 0; i < M; ++i) {
      LORASPAN_UNROLL
      for (int j = 0; j < N; ++j) {
        double* p = out + (i * N + j) * L;
        start == 0 ? flush<false>(p, sums[i][j]) : flush<true>(p, sums[i][j]);
      }
    }
    if (step == 0) break;
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
