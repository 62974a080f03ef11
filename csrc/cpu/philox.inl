// The random signs of sketch, drawn for many columns at once: Philox4x32-10 in 64-bit lanes, one column in each.
// Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011.
namespace loraspan {
namespace LORASPAN_ISA {

typedef std::uint64_t Words __attribute__((vector_size(kVectorBytes), may_alias));
constexpr int kWordLanes = kVectorBytes / 8;
constexpr std::int64_t kSignGroup = 128;

// The 64-bit products of the low halves of the lanes.
inline Words multiply_low(Words a, std::uint64_t b) {
#if defined(__AVX512F__)
  // masked, because gcc 12 warns of the undefined vector inside the plain one
  return reinterpret_cast<Words>(_mm512_maskz_mul_epu32(__mmask8{0xff}, reinterpret_cast<__m512i>(a),
                                                        _mm512_set1_epi64(static_cast<long long>(b))));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a), _mm256_set1_epi64x(static_cast<long long>(b))));
#elif defined(__SSE2__)
  return reinterpret_cast<Words>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a), _mm_set1_epi64x(static_cast<long long>(b))));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// The blocks with counters (j, group, stream) of columns [j, j + kWordLanes): bits 0 to 63 and 64 to 127.
inline void philox_blocks(std::uint64_t seed, std::uint64_t j, std::uint64_t group, std::uint64_t stream,
                          std::uint64_t* low, std::uint64_t* high) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  Words c0 = Words{} + j;
  for (int lane = 0; lane < kWordLanes; ++lane) c0[lane] += static_cast<std::uint64_t>(lane);
  // only the low halves of the lanes count until the end
  Words c1 = c0 >> 32, c2 = Words{} + group, c3 = Words{} + stream;
  for (int round = 0; round < 10; ++round) {
    const Words a = multiply_low(c0, 0xD2511F53u), b = multiply_low(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ std::uint64_t{key0};
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ std::uint64_t{key1};
    c3 = a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const Words first = (c0 & 0xffffffffu) | (c1 << 32), second = (c2 & 0xffffffffu) | (c3 << 32);
  __builtin_memcpy(low, &first, sizeof first);
  __builtin_memcpy(high, &second, sizeof second);
}

template <typename T>
struct SignBits;
template <>
struct SignBits<float> {
  typedef std::uint32_t word;
};
template <>
struct SignBits<double> {
  typedef std::uint64_t word;
};

// kLanes<T> signs of which `bits` holds one each, lowest first; a set bit is -1.
template <typename T>
inline Vec<T> signs_of(std::uint64_t bits) {
  using Word = typename SignBits<T>::word;
  typedef Word WordV __attribute__((vector_size(kVectorBytes), may_alias));
  WordV lanes{};
  for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = Word{1} << lane;
  const WordV set = reinterpret_cast<WordV>(((WordV{} + static_cast<Word>(bits)) & lanes) != 0);
  const WordV one = reinterpret_cast<WordV>(Vec<T>{} + T{1});
  return reinterpret_cast<Vec<T>>((set & (Word{1} << (8 * sizeof(Word) - 1))) | one);
}

// Rows [j, j + n) of Omega, n at most 128: `vectors` whole vectors each, vector v of row i at
// out + v * stride + i * kLanes<T>.
template <typename T>
void draw_signs(std::uint64_t seed, std::int64_t j, std::int64_t n, std::int64_t vectors, T* out, std::int64_t stride) {
  constexpr std::int64_t lanes = kLanes<T>, group_vectors = kSignGroup / lanes;
  std::uint64_t words[2][kSignGroup];
  for (std::int64_t group = 0; group * group_vectors < vectors; ++group) {
    for (std::int64_t i = 0; i < n; i += kWordLanes)
      philox_blocks(seed, static_cast<std::uint64_t>(j + i), static_cast<std::uint64_t>(group), 0, words[0] + i,
                    words[1] + i);
    const std::int64_t first = group * group_vectors, count = min_of(vectors - first, group_vectors);
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t v = 0; v < count; ++v) {
        const std::int64_t bit = v * lanes;
        store(out + (first + v) * stride + i * lanes, signs_of<T>(words[bit / 64][i] >> (bit % 64)));
      }
  }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
