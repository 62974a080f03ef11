// The stores that convert: one rounding to the dtype at hand, to nearest, ties to even.
namespace loraspan {
namespace LORASPAN_ISA {

inline void round_entry(double* p, double x) { *p = x; }
inline void round_entry(float* p, double x) { *p = static_cast<float>(x); }
inline void round_entry(Half* p, double x) { p->bits = float_to_half(round_to_odd(x)); }
inline void round_entry(Bfloat* p, double x) { p->bits = float_to_bfloat(round_to_odd(x)); }
inline void round_entry(float* p, float x) { *p = x; }
inline void round_entry(double* p, float x) { *p = x; }
inline void round_entry(Half* p, float x) { p->bits = float_to_half(x); }
inline void round_entry(Bfloat* p, float x) { p->bits = float_to_bfloat(x); }

// All lanes of x, rounded once, to p, which needs no alignment.
inline void store_as(float* p, Vec<float> x) { store(p, x); }
inline void store_as(double* p, Vec<double> x) { store(p, x); }

inline void store_as(double* p, Vec<float> x) {
  store(p, widen(low_half(x)));
  store(p + kLanes<double>, widen(high_half(x)));
}

inline void store_as(float* p, Vec<double> x) {
  const FloatHalf half = narrow(x);
  __builtin_memcpy(p, &half, sizeof half);
}

inline void store_as(Half* p, Vec<float> x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(p), _mm512_maskz_cvtps_ph(kAll, reinterpret_cast<__m512>(x), 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i_u*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#elif defined(__aarch64__)
  vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(reinterpret_cast<float32x4_t>(x))));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(x[i]);
#endif
}

// Rounded to odd, as round_to_odd does it: towards zero, and the last bit set where something was cut off.
inline FloatHalf narrow_to_odd(Vec<double> x) {
  const FloatHalf nearest = narrow(x);
  const Vec<double> back = widen(nearest);
  const Vec<double> magnitude = x < 0 ? -x : x, back_magnitude = back < 0 ? -back : back;
  // a comparison gives -1 where it holds
  const BitsHalf too_far = __builtin_convertvector(back_magnitude > magnitude, BitsHalf);
  const BitsHalf inexact = __builtin_convertvector(back != x, BitsHalf);
  return reinterpret_cast<FloatHalf>((reinterpret_cast<BitsHalf>(nearest) + too_far) | (inexact & 1u));
}

inline void store_as(Half* p, Vec<double> x) {
  const FloatHalf odd = narrow_to_odd(x);
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i_u*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(odd), 0));
#elif defined(__AVX2__)
  _mm_storel_epi64(reinterpret_cast<__m128i_u*>(p), _mm_cvtps_ph(reinterpret_cast<__m128>(odd), 0));
#else
  for (int i = 0; i < kLanes<double>; ++i) p[i].bits = float_to_half(odd[i]);
#endif
}

template <typename BitsV>
inline auto round_bfloat_bits(BitsV bits) {
  const BitsV is_nan = reinterpret_cast<BitsV>((bits & 0x7fffffffu) > 0x7f800000u);
  const BitsV rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return narrow((is_nan & ((bits >> 16) | 0x40u)) | (~is_nan & rounded));
}

inline void store_as(Bfloat* p, Vec<float> x) {
  const Shorts out = round_bfloat_bits(reinterpret_cast<Bits>(x));
  __builtin_memcpy(p, &out, sizeof out);
}

inline void store_as(Bfloat* p, Vec<double> x) {
  const ShortsHalf out = round_bfloat_bits(reinterpret_cast<BitsHalf>(narrow_to_odd(x)));
  __builtin_memcpy(p, &out, sizeof out);
}

// Copies kBytes bytes past the caches; false where the set has no such store or `to` does not lie as it asks.
template <std::size_t kBytes>
inline bool stream_bytes(void* to, const void* from) {
#if defined(__SSE2__)
  constexpr std::size_t kStep = kBytes % kVectorBytes == 0 ? kVectorBytes : kBytes % 32 == 0 ? 32 : 16;
  if (kBytes % kStep != 0 || reinterpret_cast<std::uintptr_t>(to) % kStep != 0) return false;
  for (std::size_t i = 0; i + kStep <= kBytes; i += kStep) {
    char* p = static_cast<char*>(to) + i;
    const char* q = static_cast<const char*>(from) + i;
#if defined(__AVX512F__)
    if constexpr (kStep == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(p), _mm512_loadu_si512(q));
#endif
#if defined(__AVX2__)
    if constexpr (kStep == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(p), read_unaligned<__m256i>(q));
#endif
    if constexpr (kStep == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(p), read_unaligned<__m128i>(q));
  }
  return true;
#else
  static_cast<void>(to);
  static_cast<void>(from);
  return false;
#endif
}

// store_as past the caches, where that can be: for what is not read soon. A stream_fence() has to follow.
template <typename T, typename S>
inline void stream_as(S* p, Vec<T> x) {
  S entries[kLanes<T>];
  store_as(entries, x);
  if (!stream_bytes<sizeof entries>(p, entries)) store_as(p, x);
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The first n entries of x, at most a vector.
template <typename T, typename S>
inline void store_first(S* p, Vec<T> x, std::int64_t n, bool streams = false) {
  if (n >= kLanes<T>) return streams ? stream_as<T>(p, x) : store_as(p, x);
  S entries[kLanes<T>];
  store_as(entries, x);
  for (std::int64_t i = 0; i < n; ++i) p[i] = entries[i];
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
