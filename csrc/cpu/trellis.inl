// Rounding by a trellis: Viterbi's algorithm in whole numbers, so that every processor finds the same path.
namespace loraspan {
namespace LORASPAN_ISA {

// What is rounded is in 64ths; costs are squares of distances in 256ths. Of costs only differences in 16 bits are
// looked at: eight steps lead from any state to any other, for 1024 each at the most. A path that does not begin in
// state 0 is dearer than that.
constexpr int kFraction = 64, kCostShift = 4;
constexpr std::uint16_t kNoStart = 1 << 14;
constexpr int kHalfStates = kTrellisStates / 2, kSets = 4;
// To state t lead states 2 k and, from half of all states on, 2 k + 1: k is t in that half, after an odd index and for
// odd states with these bits inverted.
constexpr int kAfterIndex = next_state(0, 1), kAfterOdd = next_state(1, 0) - kHalfStates;

// Of so many states, a number each: costs, or in every bit whether an odd index led there, the last step in the lowest.
using Costs = std::uint16_t __attribute__((vector_size(kVectorBytes)));
using CostSigns = std::int16_t __attribute__((vector_size(kVectorBytes)));
constexpr int kCostLanes = kVectorBytes / 2, kCostVectors = kHalfStates / kCostLanes, kStepsInMark = 16;
using CostOrder = CountTo<kCostLanes>::type;

// From a size in 64ths to the nearest number of a set: those that leave as much as `set` when divided by 4.
inline int distance(int size, int set) {
  return ((size - set * kFraction + 2 * kFraction) & (kSets * kFraction - 1)) - 2 * kFraction;
}

// Exact but for the cast: a product with a power of two.
inline int in_fractions(float x) {
  const int size = static_cast<int>(__builtin_fabsf(x) * kFraction + 0.5f);
  return x < 0 ? -size : size;
}

template <int Bits, int... I>
inline Costs inverted(Costs cost, Lanes<I...>) {
  return __builtin_shufflevector(cost, cost, (I ^ Bits)...);
}

// Every other one of two vectors that follow each other, in the order of numbers with `Bits` inverted.
template <int Bits, int... I>
inline Costs every_other(const Costs* two, Lanes<I...>) {
  return __builtin_shufflevector(two[0], two[1], ((2 * I) ^ Bits)...);
}

inline Costs cheaper(Costs by_even, Costs by_odd, Costs& marks) {
  const auto took = reinterpret_cast<Costs>(reinterpret_cast<CostSigns>(by_odd - by_even) < 0);
  marks += marks - took;
  return (took & by_odd) | (~took & by_even);
}

// One step for what each set costs: the cheapest ways to all states, which are even and odd by turns.
inline void advance(Costs (&even)[kCostVectors], Costs (&odd)[kCostVectors], Costs (&marks)[2 * kCostVectors],
                    const std::uint16_t* cost) {
  constexpr int n = kCostVectors, pair = 2 * kCostLanes;
  Costs to[2 * n];
  LORASPAN_UNROLL
  for (int i = 0; i < n; ++i) {
    const int other = i ^ (kAfterIndex / kCostLanes);
    const Costs even_turned = inverted<kAfterIndex % kCostLanes>(even[other], CostOrder{});
    const Costs odd_turned = inverted<kAfterIndex % kCostLanes>(odd[other], CostOrder{});
    to[i] = cheaper(even[i] + cost[0], even_turned + cost[2], marks[i]);
    to[n + i] = cheaper(odd[i] + cost[1], odd_turned + cost[3], marks[n + i]);
  }
  LORASPAN_UNROLL
  for (int i = 0; i < n / 2; ++i) {
    const Costs* two = to + 2 * i;
    even[i] = every_other<0>(two, CostOrder{});
    odd[i] = every_other<1>(two, CostOrder{});
    two = to + n + ((2 * i) ^ (kAfterOdd / pair * 2));
    even[n / 2 + i] = every_other<kAfterOdd % pair>(two, CostOrder{});
    odd[n / 2 + i] = every_other<(kAfterOdd % pair) ^ 1>(two, CostOrder{});
  }
}

inline int cheapest(const Costs* even, const Costs* odd) {
  int best = 0;
  std::int16_t least = 0;
  for (int s = 0; s < kTrellisStates; ++s) {
    const Costs* costs = s & 1 ? odd : even;
    const auto more = static_cast<std::int16_t>(costs[s / 2 / kCostLanes][s / 2 % kCostLanes] - even[0][0]);
    if (more < least) least = more, best = s;
  }
  return best;
}

inline void round_row(const float* x, std::int64_t length, std::int16_t* out) {
  auto* costs = scratch<std::uint16_t>(Use::rows, kSets * length);
  auto* took = scratch<Costs>(Use::tile, (length / kStepsInMark + 1) * 2 * kCostVectors);
  for (std::int64_t i = 0; i < length; ++i)
    for (int set = 0; set < kSets; ++set) {
      const int off = distance(in_fractions(x[i]), set);
      costs[kSets * i + set] = static_cast<std::uint16_t>(off * off >> kCostShift);
    }
  Costs even[kCostVectors], odd[kCostVectors], marks[2 * kCostVectors] = {};
  for (int i = 0; i < kCostVectors; ++i) even[i] = odd[i] = kNoStart - Costs{};
  even[0][0] = 0;
  for (std::int64_t i = 0; i < length; ++i) {
    advance(even, odd, marks, costs + kSets * i);
    if ((i + 1) % kStepsInMark == 0 || i + 1 == length)
      for (int s = 0; s < 2 * kCostVectors; ++s) took[i / kStepsInMark * 2 * kCostVectors + s] = marks[s];
  }
  const auto* bits = reinterpret_cast<const std::uint16_t*>(took);
  int state = cheapest(even, odd);
  for (std::int64_t i = length; i-- > 0;) {
    const int place = state < kHalfStates ? state : state ^ kAfterOdd, was_odd = place / kHalfStates;
    const std::int64_t last = i | (kStepsInMark - 1), steps = (last < length ? last : length - 1) - i;
    const int index = bits[i / kStepsInMark * kTrellisStates + place] >> steps & 1;
    const int size = in_fractions(x[i]);
    out[i] = static_cast<std::int16_t>((size - distance(size, was_odd + 2 * index)) / kFraction);
    state = 2 * (place % kHalfStates ^ (index ? kAfterIndex : 0)) + was_odd;
  }
}

void trellis(const float* x, std::int64_t rows, std::int64_t length, std::int16_t* out, int threads) {
  parallel_for(rows, threads, [&](std::int64_t i) { round_row(x + i * length, length, out + i * length); });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
