namespace loraspan {
namespace LORASPAN_ISA {

#if defined(__AVX512F__)
constexpr int kCeilingBytes = 64;
#elif defined(__AVX2__)
constexpr int kCeilingBytes = 32;
#else
constexpr int kCeilingBytes = 16;
#endif

typedef float CeilingF32 __attribute__((vector_size(kCeilingBytes)));
typedef double CeilingF64 __attribute__((vector_size(kCeilingBytes)));

// sum * x + y on x86, where any operand can be the one replaced; sum + x * y on NEON, where it must be the sum.
struct FusedF32 {
  using Vector = CeilingF32;
  static constexpr double kOperations = 2.0 * kCeilingBytes / sizeof(float);
  static Vector step(Vector sum, Vector x, Vector y) {
#if defined(__ARM_NEON)
    return vfmaq_f32(sum, x, y);
#else
    return sum * x + y;
#endif
  }
};

struct FusedF64 {
  using Vector = CeilingF64;
  static constexpr double kOperations = 2.0 * kCeilingBytes / sizeof(double);
  static Vector step(Vector sum, Vector x, Vector y) {
#if defined(__ARM_NEON)
    return vfmaq_f64(sum, x, y);
#else
    return sum * x + y;
#endif
  }
};

#if defined(__AVX512BF16__)
struct DotBf16 {
  using Vector = CeilingF32;
  static constexpr double kOperations = 64.0;
  static Vector step(Vector sum, Vector x, Vector y) {
    __m512bh a, b;
    __builtin_memcpy(&a, &x, sizeof a);
    __builtin_memcpy(&b, &y, sizeof b);
    return _mm512_dpbf16_ps(sum, a, b);
  }
};
#endif

// Twelve sums hide a latency of six at two a cycle. Named, because an indexed array of them would live in memory; and
// each from a start of its own, or the compiler would see that they are equal and compute one.
template <typename Fused>
__attribute__((noinline)) double spin(std::int64_t repetitions, float start) {
  using V = typename Fused::Vector;
  const V x = V{} + 0.5f, y = x, zero = V{} + start;
  V a = zero + 1.0f, b = zero + 2.0f, c = zero + 3.0f, d = zero + 4.0f, e = zero + 5.0f, f = zero + 6.0f;
  V g = zero + 7.0f, h = zero + 8.0f, i = zero + 9.0f, j = zero + 10.0f, k = zero + 11.0f, l = zero + 12.0f;
  for (std::int64_t n = 0; n < repetitions; ++n) {
    a = Fused::step(a, x, y), b = Fused::step(b, x, y), c = Fused::step(c, x, y), d = Fused::step(d, x, y);
    e = Fused::step(e, x, y), f = Fused::step(f, x, y), g = Fused::step(g, x, y), h = Fused::step(h, x, y);
    i = Fused::step(i, x, y), j = Fused::step(j, x, y), k = Fused::step(k, x, y), l = Fused::step(l, x, y);
  }
  const V sum = ((a + b) + (c + d)) + ((e + f) + (g + h)) + ((i + j) + (k + l));
  return sum[0];
}

template <typename Fused>
double spin_all(std::int64_t repetitions, int threads) {
  parallel_for(threads, threads, [&](std::int64_t thread) {
    // nobody reads it, but the compiler must not know that
    volatile double kept = spin<Fused>(repetitions, static_cast<float>(thread));
    static_cast<void>(kept);
  });
  return 12.0 * Fused::kOperations * static_cast<double>(repetitions) * threads;
}

double arithmetic(Arithmetic kind, std::int64_t repetitions, int threads) {
  if (kind == Arithmetic::f32) return spin_all<FusedF32>(repetitions, threads);
  if (kind == Arithmetic::f64) return spin_all<FusedF64>(repetitions, threads);
#if defined(__AVX512BF16__)
  return spin_all<DotBf16>(repetitions, threads);
#else
  return 0;
#endif
}

inline void stream_store(CeilingF32* to, CeilingF32 value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(to), value);
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(to), value);
#elif defined(__SSE2__)
  _mm_stream_ps(reinterpret_cast<float*>(to), value);
#else
  *to = value;
#endif
}

inline void move(Traffic kind, CeilingF32* to, const CeilingF32* from, std::int64_t count) {
  const CeilingF32 value = CeilingF32{} + 1.5f;
  if (kind == Traffic::read) {
    CeilingF32 a = value, b = a, c = a, d = a;
    for (std::int64_t i = 0; i + 4 <= count; i += 4) a += from[i], b += from[i + 1], c += from[i + 2], d += from[i + 3];
    volatile float kept = ((a + b) + (c + d))[0];
    static_cast<void>(kept);
  } else if (kind == Traffic::stream) {
    for (std::int64_t i = 0; i < count; ++i) stream_store(to + i, value);
#if defined(__SSE2__)
    _mm_sfence();
#endif
  } else {
    for (std::int64_t i = 0; i < count; ++i) {
      to[i] = kind == Traffic::write ? value : from[i];
      // or the loop becomes a call of memset or memcpy, which choose their stores by themselves
      __asm__ volatile("" ::: "memory");
    }
  }
}

void traffic(Traffic kind, void* to, const void* from, std::int64_t bytes, int threads) {
  // whole lines of 64 bytes
  const std::int64_t lines = bytes / 64, vectors = 64 / kCeilingBytes;
  parallel_for(threads, threads, [&](std::int64_t thread) {
    const std::int64_t start = lines * thread / threads * vectors, stop = lines * (thread + 1) / threads * vectors;
    move(kind, static_cast<CeilingF32*>(to) + start, static_cast<const CeilingF32*>(from) + start, stop - start);
  });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
