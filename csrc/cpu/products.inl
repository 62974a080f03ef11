// Products of vectors and what they are added up in: for pairs of bfloat16 entries that is not their own type.
namespace loraspan {
namespace LORASPAN_ISA {

// What the products of T are added up in, and how many entries of a row one T holds.
template <typename T>
struct SumOf {
  using type = Vec<T>;
};
template <typename T>
using Sum = typename SumOf<T>::type;
template <typename T>
constexpr std::int64_t kEntries = 1;

template <typename V>
inline V multiply_add(V a, V b, V sum) {
  return a * b + sum;
}

#if defined(__AVX512BF16__)
// Two bfloat16 entries, whose products are added one after the other, each rounded once. Subnormal numbers, entries and
// sums alike, count as zero.
struct Pair {
  std::uint32_t bits;
};
template <>
struct VectorOf<Pair> {
  typedef Bits type;
  typedef std::uint32_t unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(1)));
};
template <>
struct SumOf<Pair> {
  using type = Vec<float>;
};
template <>
constexpr std::int64_t kEntries<Pair> = 2;

inline Vec<float> multiply_add(Bits a, Bits b, Vec<float> sum) {
  return reinterpret_cast<Vec<float>>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}
inline Bits broadcast(Pair x) { return x.bits - Bits{}; }
#endif

}  // namespace LORASPAN_ISA
}  // namespace loraspan
