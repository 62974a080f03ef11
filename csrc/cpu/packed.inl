// Reading packed rows: whole lines of entries, and panels made of them.
namespace loraspan {
namespace LORASPAN_ISA {

// The 16 levels of 4 bits: chosen for the least squared error of normal entries in blocks of 64 whose scale has been
// searched, with 0 among them. They are not symmetric: a negative scale turns them round where that fits better.
constexpr int kLevelCount = 16;
constexpr std::int8_t kLevels[kLevelCount] = {-116, -89, -69, -53, -38, -25, -12, 0, 10, 21, 32, 45, 59, 75, 95, 127};

typedef std::int8_t Bytes __attribute__((vector_size(kVectorBytes / 4), may_alias));
typedef std::int16_t Pairs __attribute__((vector_size(kVectorBytes / 2), may_alias));
typedef std::int32_t Ints __attribute__((vector_size(kVectorBytes), may_alias));

inline std::int64_t code_bytes(std::int64_t length, std::int64_t bits) { return (length * bits + 7) / 8; }
inline std::int64_t scale_count(std::int64_t length) { return (length + kPackedBlock - 1) / kPackedBlock; }

// The dtype of entries of so many bits, or `plain` for none.
inline Dtype packed_dtype(std::int64_t bits, Dtype plain) {
  return bits == 16 ? Dtype::packed16 : bits == 8 ? Dtype::packed8 : bits == 4 ? Dtype::packed4 : plain;
}

inline std::int64_t bits_of(Dtype dtype) {
  return dtype == Dtype::packed16 ? 16 : dtype == Dtype::packed8 ? 8 : dtype == Dtype::packed4 ? 4 : 0;
}

inline bool is_packed(Dtype dtype) { return bits_of(dtype) != 0; }

// The rows that are the columns of a packed matrix.
inline PackedRows columns_of(const Matrix& a) {
  return {static_cast<const std::uint8_t*>(a.data), a.scales, a.length, bits_of(a.dtype)};
}

// kLanes<float> signed numbers from p on, which needs no alignment.
inline Vec<float> load_levels(const std::int8_t* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_maskz_cvtepi8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p)));
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtepi32_ps(kAll, wide));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p)));
  return reinterpret_cast<Vec<float>>(_mm256_cvtepi32_ps(wide));
#else
  return __builtin_convertvector(__builtin_convertvector(read_unaligned<Bytes>(p), Ints), Vec<float>);
#endif
}

inline Vec<float> load_levels(const std::int16_t* p) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_maskz_cvtepi16_epi32(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p)));
  return reinterpret_cast<Vec<float>>(_mm512_maskz_cvtepi32_ps(kAll, wide));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p)));
  return reinterpret_cast<Vec<float>>(_mm256_cvtepi32_ps(wide));
#else
  return __builtin_convertvector(__builtin_convertvector(read_unaligned<Pairs>(p), Ints), Vec<float>);
#endif
}

inline float level_at(const std::uint8_t* codes, std::int64_t i, std::int64_t bits) {
  if (bits == 8) return static_cast<float>(static_cast<std::int8_t>(codes[i]));
  if (bits == 16) return static_cast<float>(read_unaligned<std::int16_t>(codes + 2 * i));
  return static_cast<float>(kLevels[(codes[i / 2] >> (i % 2 * 4)) & 15]);
}

// Entries whose levels are read from 4-bit codes at once.
constexpr std::int64_t kReadLevels = 16;

inline void read_levels(const std::uint8_t* codes, std::int8_t* levels) {
#if defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(codes)), mask = _mm_set1_epi8(15);
  const __m128i low = _mm_and_si128(bytes, mask), high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask);
  const __m128i table = _mm_loadu_si128(reinterpret_cast<const __m128i_u*>(kLevels));
  _mm_storeu_si128(reinterpret_cast<__m128i_u*>(levels), _mm_shuffle_epi8(table, _mm_unpacklo_epi8(low, high)));
#else
  for (std::int64_t i = 0; i < kReadLevels; i += 2) {
    levels[i] = kLevels[codes[i / 2] & 15];
    levels[i + 1] = kLevels[codes[i / 2] >> 4];
  }
#endif
}

// Entries [first, first + n) of one block of a row, `step` = scale / 128, to out.
template <typename S>
inline void unpack_block(const std::uint8_t* codes, std::int64_t bits, std::int64_t first, std::int64_t n, float step,
                         S* out) {
  constexpr std::int64_t L = kLanes<float>;
  std::int64_t i = 0;
  if (bits == 4) {
    // where a byte begins
    if (first % 2 != 0) round_entry(out + i++, level_at(codes, first, bits) * step);
    alignas(16) std::int8_t levels[kReadLevels];
    for (; i + kReadLevels <= n; i += kReadLevels) {
      read_levels(codes + (first + i) / 2, levels);
      LORASPAN_UNROLL
      for (std::int64_t j = 0; j < kReadLevels; j += L)
        store_as(out + i + j, load_levels(levels + j) * broadcast(step));
    }
  } else if (bits == 8) {
    const std::int8_t* levels = reinterpret_cast<const std::int8_t*>(codes) + first;
    for (; i + L <= n; i += L) store_as(out + i, load_levels(levels + i) * broadcast(step));
  } else {
    const std::int16_t* levels = reinterpret_cast<const std::int16_t*>(codes) + first;
    for (; i + L <= n; i += L) store_as(out + i, load_levels(levels + i) * broadcast(step));
  }
  for (; i < n; ++i) round_entry(out + i, level_at(codes, first + i, bits) * step);
}

// Entries [first, first + n) of a row, in float32 (which holds those of 8 and 4 bits) and as S, to out.
template <typename S>
inline void unpack_line(const PackedRows& x, std::int64_t row, std::int64_t first, std::int64_t n, S* out) {
  const std::uint8_t* codes = x.codes + row * code_bytes(x.length, x.bits);
  const std::uint16_t* scales = x.scales + row * scale_count(x.length);
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t at = first + i, block = at / kPackedBlock;
    const std::int64_t count = min_of(n - i, (block + 1) * kPackedBlock - at);
    unpack_block(codes, x.bits, at, count, half_to_float(scales[block]) * 0x1p-7f, out + i);
    i += count;
  }
}

// The same as T, with zeros up to a whole vector.
template <typename T>
inline void unpack_padded(const PackedRows& x, std::int64_t row, std::int64_t first, std::int64_t n, T* out) {
  unpack_line(x, row, first, n, out);
  for (std::int64_t i = n; i < round_up(n, kLanes<T>); ++i) out[i] = 0;
}

// Panels of packed^T: lane i of vector c of panel p is entry `first` + p L + i of row c. `n` entries, `rows` rows.
template <typename T>
inline void panels_along(const PackedRows& x, std::int64_t rows, std::int64_t first, std::int64_t n, T* panels,
                         std::int64_t stride) {
  constexpr std::int64_t L = kLanes<T>;
  alignas(64) T line[4 * kPackedBlock];
  for (std::int64_t c = 0; c < rows; ++c)
    for (std::int64_t start = 0; start < n; start += 4 * kPackedBlock) {
      const std::int64_t width = min_of(n - start, 4 * kPackedBlock);
      unpack_padded(x, c, first + start, width, line);
      for (std::int64_t i = 0; i < width; i += L)
        store(panels + (start + i) / L * stride + c * L, load(static_cast<const T*>(line) + i));
    }
}

// Panel p of packed rows, of which there are `rows`: lane i of vector c is entry c0 + c of row p L + i, zero past the
// last row.
template <typename T>
inline void panel_across(const PackedRows& x, std::int64_t rows, std::int64_t p, std::int64_t c0, std::int64_t n,
                         T* panel) {
  constexpr std::int64_t L = kLanes<T>;
  alignas(64) T lines[L * kLineColumns];
  const std::int64_t lanes = max_of(0, min_of(rows - p * L, L));
  for (std::int64_t start = 0; start < n; start += kLineColumns) {
    const std::int64_t width = min_of(n - start, kLineColumns);
    for (std::int64_t i = 0; i < lanes; ++i) unpack_padded(x, p * L + i, c0 + start, width, lines + i * kLineColumns);
    for (std::int64_t i = lanes * kLineColumns; i < L * kLineColumns; ++i) lines[i] = 0;
    transpose_lines(static_cast<const T*>(lines), width, panel + start * L);
  }
}

void unpack(const PackedRows& x, std::int64_t rows, void* out, Dtype dtype, int threads) {
  constexpr std::int64_t kEntries = 64 * kPackedBlock;
  const std::int64_t pieces = (x.length + kEntries - 1) / kEntries;
  parallel_for(rows * pieces, threads, [&](std::int64_t task) {
    const std::int64_t row = task / pieces, first = task % pieces * kEntries;
    with_type(out, dtype, [&](auto* data) {
      using S = typename Writable<decltype(data)>::type;
      unpack_line(x, row, first, min_of(kEntries, x.length - first), const_cast<S*>(data) + row * x.length + first);
    });
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
