// Vectors of one register of the instruction set, and the loads that convert.
//
// Vec<float> and Vec<double> are the compiler's vector extensions: + - * work, and a * b + c is one fused multiply-add
// where the set has one. Half-precision entries are Half and Bfloat, so that a template can tell them apart.
#ifndef LORASPAN_UNROLL
// The loop after it has a constant count, and its arrays of vectors are to become registers.
#ifdef __clang__
#define LORASPAN_UNROLL _Pragma("clang loop unroll(full)")
#else
#define LORASPAN_UNROLL _Pragma("GCC unroll 16")
#endif
#endif

namespace loraspan {
namespace LORASPAN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
// gcc 12 warns of the undefined vector inside the forms without a mask; this one compiles to the same instruction
constexpr __mmask16 kAll = 0xffff;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct Half {
  std::uint16_t bits;
};
struct Bfloat {
  std::uint16_t bits;
};

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(1)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes), may_alias));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), may_alias, aligned(1)));
};

template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// half as many floats as a register holds: what widens to one Vec<double>
typedef float FloatHalf __attribute__((vector_size(kVectorBytes / 2), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes), may_alias));
typedef std::uint32_t BitsHalf __attribute__((vector_size(kVectorBytes / 2), may_alias));
typedef std::uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2), may_alias));
typedef std::uint16_t ShortsHalf __attribute__((vector_size(kVectorBytes / 4), may_alias));

template <typename V>
inline V read_unaligned(const void* p) {
  V value;
  __builtin_memcpy(&value, p, sizeof value);
  return value;
}

template <typename T>
inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(p);
}

template <typename T>
inline void store(T* p, Vec<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(p) = value;
}

template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

inline float widen_entry(Half x) { return half_to_float(x.bits); }
inline float widen_entry(Bfloat x) { return bfloat_to_float(x.bits); }
inline float widen_entry(float x) { return x; }
inline double widen_entry(double x) { return x; }

// Integer arithmetic on all lanes, as half_to_float does it on one.
template <typename FloatV, typename BitsV>
inline FloatV widen_half_bits(BitsV half) {
  const BitsV sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  const FloatV scaled = reinterpret_cast<FloatV>(magnitude << 13) * 0x1p112f;
  const BitsV special = reinterpret_cast<BitsV>(magnitude >= 0x7c00u);
  const BitsV finite = reinterpret_cast<BitsV>(scaled);
  return reinterpret_cast<FloatV>(sign | (special & (0x7f800000u | (magnitude << 13))) | (~special & finite));
}

// kLanes<T> entries from p on, which needs no alignment, converted to T. float64 to float32 rounds to nearest.
template <typename T>
Vec<T> load_as(const Half* p);
template <typename T>
Vec<T> load_as(const Bfloat* p);
template <typename T>
Vec<T> load_as(const float* p);
template <typename T>
Vec<T> load_as(const double* p);

// gcc 12 makes two halves of what AVX-512 converts at once.
inline Vec<double> widen(FloatHalf x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<double>>(_mm512_maskz_cvtps_pd(0xff, reinterpret_cast<__m256>(x)));
#else
  return __builtin_convertvector(x, Vec<double>);
#endif
}

inline Bits widen(Shorts x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Bits>(_mm512_maskz_cvtepu16_epi32(kAll, reinterpret_cast<__m256i>(x)));
#else
  return __builtin_convertvector(x, Bits);
#endif
}

inline Shorts narrow(Bits x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Shorts>(_mm512_maskz_cvtepi32_epi16(kAll, reinterpret_cast<__m512i>(x)));
#else
  return __builtin_convertvector(x, Shorts);
#endif
}

inline ShortsHalf narrow(BitsHalf x) { return __builtin_convertvector(x, ShortsHalf); }
inline FloatHalf narrow(Vec<double> x) { return __builtin_convertvector(x, FloatHalf); }

inline FloatHalf load_float_half(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<FloatHalf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<FloatHalf>(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i_u*>(p))));
#else
  return widen_half_bits<FloatHalf>(__builtin_convertvector(read_unaligned<ShortsHalf>(p), BitsHalf));
#endif
}

inline FloatHalf load_float_half(const Bfloat* p) {
  return reinterpret_cast<FloatHalf>(__builtin_convertvector(read_unaligned<ShortsHalf>(p), BitsHalf) << 16);
}

template <>
inline Vec<float> load_as<float>(const Half* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i_u*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i_u*>(p))));
#elif defined(__aarch64__)
  return reinterpret_cast<Vec<float>>(vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))));
#else
  return widen_half_bits<Vec<float>>(__builtin_convertvector(read_unaligned<Shorts>(p), Bits));
#endif
}

template <>
inline Vec<float> load_as<float>(const Bfloat* p) {
  return reinterpret_cast<Vec<float>>(widen(read_unaligned<Shorts>(p)) << 16);
}

template <>
inline Vec<double> load_as<double>(const Half* p) {
  return widen(load_float_half(p));
}

template <>
inline Vec<double> load_as<double>(const Bfloat* p) {
  return widen(load_float_half(p));
}

inline FloatHalf low_half(Vec<float> x) {
  FloatHalf half;
  __builtin_memcpy(&half, &x, sizeof half);
  return half;
}

inline FloatHalf high_half(Vec<float> x) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, x, 4, 5, 6, 7);
#else
  return __builtin_shufflevector(x, x, 2, 3);
#endif
}

inline Vec<float> join(FloatHalf low, FloatHalf high) {
#if defined(__AVX512F__)
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
#elif defined(__AVX2__)
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
#else
  return __builtin_shufflevector(low, high, 0, 1, 2, 3);
#endif
}

template <>
inline Vec<float> load_as<float>(const float* p) {
  return load(p);
}

template <>
inline Vec<double> load_as<double>(const double* p) {
  return load(p);
}

template <>
inline Vec<double> load_as<double>(const float* p) {
  return widen(read_unaligned<FloatHalf>(p));
}

template <>
inline Vec<float> load_as<float>(const double* p) {
  return join(narrow(load(p)), narrow(load(p + kLanes<double>)));
}

// The first n <= kLanes<T> entries from p on, zeros behind them; reads nothing else.
template <typename T, typename S>
inline Vec<T> load_first(const S* p, std::int64_t n) {
  S buffer[kLanes<T>] = {};
#if defined(__AVX512F__)
  if (sizeof(S) == 2 && sizeof(T) == 4) {
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);
    _mm256_storeu_si256(reinterpret_cast<__m256i_u*>(buffer), _mm256_maskz_loadu_epi16(mask, p));
    return load_as<T>(buffer);
  }
  if (sizeof(S) == 4 && sizeof(T) == 4) {
    const __mmask16 mask = static_cast<__mmask16>((1u << n) - 1u);
    return reinterpret_cast<Vec<T>>(_mm512_maskz_loadu_ps(mask, p));
  }
#endif
  for (std::int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load_as<T>(buffer);
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
