// Packing rows: 8 bits by the largest entry of a block, 4 bits by a search for the scale.
//
// Every set has the same bits. Levels times scales are exact in float32, and so are the points between them that a code
// is chosen by; an error is rounded once; its square is exact in float64, and squares are added in one order. So it
// does not matter which products and sums the compiler fuses.
namespace loraspan {
namespace LORASPAN_ISA {

// Scales tried in 4 bits, of what takes the largest entry to the largest level, each with both signs.
constexpr int kRatioCount = 4;
constexpr double kRatios[kRatioCount] = {1.0, 0.84, 0.92, 1.08};
// Steps that then take the scale of least squares for the codes at hand.
constexpr int kScaleSteps = 2;
constexpr double kLargestScale = 65504.0;

struct PackedEntries {
  alignas(64) float x[kPackedBlock];
};

// One choice of scale for a block: levels of all entries, and the sum of squared errors.
struct Choice {
  alignas(64) float levels[kPackedBlock];
  double error;
  float scale;   // what is stored, without its sign
  bool flipped;  // whether it is stored negative
};

// Bits of the largest magnitude; those of a NaN are above all others.
inline std::uint32_t largest_bits(const float* x) {
  constexpr int L = kLanes<float>;
  Bits most = {};
  for (std::int64_t i = 0; i < kPackedBlock; i += L) {
    const Bits bits = reinterpret_cast<Bits>(load(x + i)) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  std::uint32_t found = 0;
  for (int i = 0; i < L; ++i) found = most[i] > found ? most[i] : found;
  return found;
}

inline float as_scale(double value) {
  const double kept = value < kLargestScale ? value : kLargestScale;
  return half_to_float(float_to_half(round_to_odd(kept)));
}

// Sum of a_i b_i over a block: products of float32 numbers that float64 holds exactly, added eight apart and then in
// pairs.
struct OrderedSum {
  static constexpr int kStep = kLanes<double>, kSums = 8 / kStep;
  Vec<double> sums[kSums] = {};

  // The products of entries from i on.
  void add(std::int64_t i, Vec<float> a, Vec<float> b) {
    Vec<double>&low = sums[i / kStep % kSums], &high = sums[(i / kStep + 1) % kSums];
    low = widen(low_half(a)) * widen(low_half(b)) + low;
    high = widen(high_half(a)) * widen(high_half(b)) + high;
  }

  double total() const {
    alignas(64) double s[8];
    LORASPAN_UNROLL
    for (int j = 0; j < kSums; ++j) store(s + j * kStep, sums[j]);
    return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
  }
};

inline double ordered_dot(const float* a, const float* b) {
  OrderedSum sum;
  LORASPAN_UNROLL
  for (std::int64_t i = 0; i < kPackedBlock; i += kLanes<float>) sum.add(i, load(a + i), load(b + i));
  return sum.total();
}

// Half the sum of neighbouring levels, with which an entry is compared, over 128; and the levels.
struct LevelTables {
  alignas(64) float points[kLevelCount], levels[kLevelCount];
  constexpr LevelTables() : points(), levels() {
    for (int j = 0; j < kLevelCount; ++j) {
      points[j] = j > 0 ? static_cast<float>(kLevels[j - 1] + kLevels[j]) * 0x1p-8f : 0;
      levels[j] = static_cast<float>(kLevels[j]);
    }
  }
};
constexpr LevelTables kTables;

// Finds the level whose product with a scale is nearest: the one after as many points between levels as are passed.
struct NearestLevels {
#if defined(__AVX512F__)
  // the points, and the levels, in a register each: four steps halve what is left
  __m512 points, levels;
  explicit NearestLevels(float scale)
      : points(reinterpret_cast<__m512>(load(kTables.points) * broadcast(scale))),
        levels(reinterpret_cast<__m512>(load(kTables.levels))) {}
  Vec<float> of(Vec<float> entries) const {
    Ints index = {};
    LORASPAN_UNROLL
    for (int step = 8; step > 0; step /= 2) {
      const Ints next = index + step;
      const __m512 point = _mm512_maskz_permutexvar_ps(kAll, reinterpret_cast<__m512i>(next), points);
      index = entries > reinterpret_cast<Vec<float>>(point) ? next : index;
    }
    return reinterpret_cast<Vec<float>>(_mm512_maskz_permutexvar_ps(kAll, reinterpret_cast<__m512i>(index), levels));
  }
#else
  float scale;
  explicit NearestLevels(float scale) : scale(scale) {}
  Vec<float> of(Vec<float> entries) const {
    Vec<float> level = broadcast(kTables.levels[0]);
    LORASPAN_UNROLL
    for (int j = 1; j < kLevelCount; ++j) {
      const Ints past = entries > broadcast(scale * kTables.points[j]);
      const Vec<float> step = broadcast(kTables.levels[j] - kTables.levels[j - 1]);
      level += reinterpret_cast<Vec<float>>(past & reinterpret_cast<Ints>(step));
    }
    return level;
  }
#endif
};

// The nearest level of every entry, and what error they leave.
inline void choose_levels(const float* x, float scale, bool flipped, Choice* choice) {
  constexpr int L = kLanes<float>;
  choice->scale = scale;
  choice->flipped = flipped;
  const NearestLevels nearest(scale);
  OrderedSum squares;
  LORASPAN_UNROLL
  for (std::int64_t i = 0; i < kPackedBlock; i += L) {
    const Vec<float> entries = flipped ? -load(x + i) : load(x + i);
    const Vec<float> level = nearest.of(entries);
    store(choice->levels + i, level);
    const Vec<float> error = entries - level * broadcast(scale * 0x1p-7f);
    squares.add(i, error, error);
  }
  choice->error = squares.total();
}

// The best of the scales that are tried, in one of `room`; its scale is 0 where none is above what float16 can hold.
inline const Choice& search_scale(const float* x, double largest, Choice (&room)[2]) {
  Choice *best = &room[0], *next = &room[1];
  const auto take = [&] {
    Choice* const better = next;
    next = best;
    best = better;
  };
  // levels of 0
  *best = {};
  const double whole = largest * 128.0 / 127.0;
  if (as_scale(whole) == 0) return *best;
  for (const double ratio : kRatios) {
    const float scale = as_scale(whole * ratio);
    if (scale == 0) continue;
    for (int sign = 0; sign < 2; ++sign) {
      choose_levels(x, scale, sign != 0, next);
      if (best->scale == 0 || next->error < best->error) take();
    }
  }
  for (int step = 0; step < kScaleSteps; ++step) {
    const double squares = ordered_dot(best->levels, best->levels), product = ordered_dot(x, best->levels);
    const double fitted = (best->flipped ? -product : product) * 128.0 / squares;
    // levels of 0 alone fit any scale
    if (!(squares > 0) || !(fitted > 0)) break;
    const float scale = as_scale(fitted);
    if (scale == 0 || scale == best->scale) break;
    choose_levels(x, scale, best->flipped, next);
    if (!(next->error < best->error)) break;
    take();
  }
  return *best;
}

// A block of n entries, zeros behind them, to its codes; gives its scale.
inline std::uint16_t pack_four(const float* x, float largest, std::int64_t n, std::uint8_t* codes) {
  constexpr int L = kLanes<float>;
  Choice room[2];
  const Choice& best = search_scale(x, largest, room);
  alignas(64) std::int8_t index[kPackedBlock];
  for (std::int64_t i = 0; i < kPackedBlock; i += L) {
    const Vec<float> level = load(best.levels + i);
    Ints found = {};
    // a comparison gives -1 where it holds
    LORASPAN_UNROLL
    for (int j = 1; j < kLevelCount; ++j) found -= level >= broadcast(kTables.levels[j]);
    const Bytes bytes = __builtin_convertvector(found, Bytes);
    __builtin_memcpy(index + i, &bytes, sizeof bytes);
  }
  for (std::int64_t i = 0; i < (n + 1) / 2; ++i)
    codes[i] = static_cast<std::uint8_t>(index[2 * i] | index[2 * i + 1] << 4);
  return float_to_half(best.flipped ? -best.scale : best.scale);
}

inline std::uint16_t pack_eight(const float* x, float largest, std::int64_t n, std::uint8_t* codes) {
  constexpr int L = kLanes<float>;
  const float scale = as_scale(largest * 128.0 / 127.0);
  alignas(64) std::int8_t levels[kPackedBlock] = {};
  // adding this takes the fraction away, to the nearest even where it is a half
  const Vec<float> magic = broadcast(0x1.8p23f), most = broadcast(127.0f);
  for (std::int64_t i = 0; i < kPackedBlock && scale > 0; i += L) {
    const Vec<float> ratio = load(x + i) / broadcast(scale * 0x1p-7f);
    Vec<float> level = (ratio + magic) - magic;
    level = level > most ? most : level < -most ? -most : level;
    const Bytes bytes = __builtin_convertvector(__builtin_convertvector(level, Ints), Bytes);
    __builtin_memcpy(levels + i, &bytes, sizeof bytes);
  }
  __builtin_memcpy(codes, levels, static_cast<size_t>(n));
  return float_to_half(scale);
}

std::int64_t pack(const Block& x, std::int64_t length, std::int64_t bits, std::uint8_t* codes, std::uint16_t* scales,
                  int threads) {
  constexpr std::int64_t kBlocks = 16;
  const std::int64_t blocks = scale_count(length), pieces = (blocks + kBlocks - 1) / kBlocks;
  std::uint8_t* wrong = scratch<std::uint8_t>(Use::plan, x.rows * pieces);
  parallel_for(x.rows * pieces, threads, [&](std::int64_t task) {
    const std::int64_t row = task / pieces, first = task % pieces * kBlocks;
    std::uint8_t* to = codes + row * code_bytes(length, bits);
    wrong[task] = 0;
    for (std::int64_t block = first; block < min_of(blocks, first + kBlocks); ++block) {
      const std::int64_t c0 = block * kPackedBlock, n = min_of(kPackedBlock, length - c0);
      PackedEntries entries = {};
      with_type(x.data, x.dtype, [&](auto* data) {
        read_line(data + row * x.row_stride + c0 * x.col_stride, x.col_stride, n, entries.x);
      });
      const std::uint32_t largest = largest_bits(entries.x);
      if (largest > float_to_bits(kPackedLargest)) {
        wrong[task] = 1;
        continue;
      }
      scales[row * blocks + block] = bits == 8 ? pack_eight(entries.x, bits_to_float(largest), n, to + c0)
                                               : pack_four(entries.x, bits_to_float(largest), n, to + c0 / 2);
    }
  });
  for (std::int64_t task = 0; task < x.rows * pieces; ++task)
    if (wrong[task]) return task / pieces;
  return -1;
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
