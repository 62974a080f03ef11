// The random signs of sketch, drawn for many columns at once: Philox4x32-10 in 64-bit lanes, one column in each.
// Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011.
namespace loraspan {
namespace LORASPAN_ISA {

typedef std::uint64_t Words __attribute__((vector_size(kVectorBytes), may_alias));
constexpr int kWordLanes = kVectorBytes / 8;
// Signs of one column that a block holds, and columns whose signs make a word.
constexpr std::int64_t kSignGroup = 128;
constexpr std::int64_t kWordColumns = 32;

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

// The blocks with counters (j, group, stream) of the columns in the lanes of j: bits 0 to 63 and 64 to 127.
inline void philox_blocks(std::uint64_t seed, Words j, std::uint64_t group, std::uint64_t stream, Words* low,
                          Words* high) {
  std::uint32_t key0 = static_cast<std::uint32_t>(seed), key1 = static_cast<std::uint32_t>(seed >> 32);
  // only the low halves of the lanes count until the end
  Words c0 = j, c1 = j >> 32, c2 = Words{} + group, c3 = Words{} + stream;
  for (int round = 0; round < 10; ++round) {
    const Words a = multiply_low(c0, 0xD2511F53u), b = multiply_low(c2, 0xCD9E8D57u);
    c0 = (b >> 32) ^ c1 ^ std::uint64_t{key0};
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ std::uint64_t{key1};
    c3 = a;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  *low = (c0 & 0xffffffffu) | (c1 << 32);
  *high = (c2 & 0xffffffffu) | (c3 << 32);
}

// Two matrices of 32 x 32 bits in each lane, one in the low halves and one in the high ones: bit i of row j becomes bit
// j of row i. Squares of half the size change places each time (Warren, Hacker's Delight, 2002, section 7-3).
inline void transpose_bits(Words (&rows)[kWordColumns]) {
  std::uint64_t mask = 0x0000ffff0000ffffu;
  for (int step = 16; step > 0; step /= 2, mask ^= mask << step)
    for (int i = 0; i < kWordColumns; i = (i + step + 1) & ~step) {
      const Words other = ((rows[i] >> step) ^ rows[i + step]) & mask;
      rows[i] ^= other << step;
      rows[i + step] ^= other;
    }
}

// Where the word of signs w of column c is. Those that the lanes of a vector draw lie beside each other.
inline std::int64_t word_at(std::int64_t w, std::int64_t c, std::int64_t width) {
  return (w / kWordLanes * width + c) * kWordLanes + w % kWordLanes;
}

// Rows [j, j + 32 words) of Omega, and those up to whole vectors of words: bit i of out[word_at(w, c, width)] is the
// sign of row j + 32 w + i in column c, set for -1.
inline void draw_signs(std::uint64_t seed, std::int64_t j, std::int64_t words, std::int64_t width, std::uint32_t* out) {
  Words lanes{};
  for (int lane = 0; lane < kWordLanes; ++lane) lanes[lane] = static_cast<std::uint64_t>(kWordColumns * lane);
  for (std::int64_t w = 0; w < words; w += kWordLanes)
    for (std::int64_t c0 = 0; c0 < width; c0 += kSignGroup) {
      const Words first = lanes + static_cast<std::uint64_t>(j + w * kWordColumns);
      Words bits[2][kWordColumns];
      for (std::uint64_t i = 0; i < kWordColumns; ++i)
        philox_blocks(seed, first + i, static_cast<std::uint64_t>(c0 / kSignGroup), 0, &bits[0][i], &bits[1][i]);
      transpose_bits(bits[0]);
      if (width - c0 > kSignGroup / 2) transpose_bits(bits[1]);
      for (std::int64_t c = 0; c < min_of(width - c0, kSignGroup); ++c) {
        const Words both = bits[c / 64][c % kWordColumns];
        const BitsHalf word = __builtin_convertvector(c & kWordColumns ? both >> 32 : both, BitsHalf);
        __builtin_memcpy(out + word_at(w, c0 + c, width), &word, sizeof word);
      }
    }
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
