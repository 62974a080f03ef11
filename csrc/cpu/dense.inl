// What the small dense methods share: rows padded with zeros to whole vectors, and sums over them in a fixed order.
namespace loraspan {
namespace LORASPAN_ISA {

constexpr double kRoundoff = 0x1p-53;

inline std::int64_t padded_row(std::int64_t n) { return round_up(n, kLanes<double>); }

inline double larger(double a, double b) { return a > b ? a : b; }

// All functions below take rows padded to whole vectors; [first, end) are counts of entries, both at whole vectors.
inline double add_lanes(Vec<double> x) {
  alignas(64) double t[kLanes<double>];
  store(t, x);
  LORASPAN_UNROLL
  for (int half = kLanes<double> / 2; half > 0; half /= 2) LORASPAN_UNROLL
  for (int i = 0; i < half; ++i) t[i] += t[i + half];
  return t[0];
}

inline double add_all_lanes(Vec<double> x) { return add_lanes(x); }
inline double add_all_lanes(Vec<float> x) {
  alignas(64) float entries[kLanes<float>];
  store(entries, x);
  constexpr int L = kLanes<double>;
  return add_lanes(load_as<double>(entries) + load_as<double>(entries + L));
}

inline double dot(const double* x, const double* y, std::int64_t first, std::int64_t end) {
  constexpr int L = kLanes<double>;
  Vec<double> a{}, b{};
  std::int64_t i = first;
  for (; i + 2 * L <= end; i += 2 * L) {
    a = load(x + i) * load(y + i) + a;
    b = load(x + i + L) * load(y + i + L) + b;
  }
  if (i < end) a = load(x + i) * load(y + i) + a;
  return add_lanes(a + b);
}

inline void add_multiple(double* y, double factor, const double* x, std::int64_t first, std::int64_t end) {
  const Vec<double> f = broadcast(factor);
  for (std::int64_t i = first; i < end; i += kLanes<double>) store(y + i, f * load(x + i) + load(y + i));
}

// (x, y) <- (c x - s y, s x + c y)
inline void rotate(double* x, double* y, double c, double s, std::int64_t end) {
  const Vec<double> cv = broadcast(c), sv = broadcast(s);
  for (std::int64_t i = 0; i < end; i += kLanes<double>) {
    const Vec<double> a = load(x + i), b = load(y + i);
    store(x + i, cv * a - sv * b);
    store(y + i, sv * a + cv * b);
  }
}

// A power of two near 1 / max |a|, so that squares neither overflow nor vanish; 0 if an entry is not finite.
inline double unit_scale(const double* a, std::int64_t count) {
  double largest = 0, check = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    largest = larger(largest, a[i] < 0 ? -a[i] : a[i]);
    check += a[i] * 0;
  }
  if (!(check == 0)) return 0;
  if (largest == 0) return 1;
  int exponent = 0;
  static_cast<void>(__builtin_frexp(largest, &exponent));
  // 2^1023 is the largest power there is
  return __builtin_ldexp(1.0, exponent < -1022 ? 1022 : -exponent);
}

inline void fill(double* out, std::int64_t count, double value) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = value;
}

// The places of `values` in descending order, those of equal ones by index.
inline void sort_descending(const double* values, std::int64_t n, std::int64_t* order) {
  for (std::int64_t i = 0; i < n; ++i) {
    std::int64_t at = i;
    for (; at > 0 && values[order[at - 1]] < values[i]; --at) order[at] = order[at - 1];
    order[at] = i;
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
