// Rounding by a trellis: Viterbi's algorithm in whole numbers, so that every processor finds the same path.
namespace loraspan {
namespace LORASPAN_ISA {

// What is rounded is in 64ths, distances are squares of those. A zero between odd numbers is as rare as it is dear to
// write: it costs a square of 1.
constexpr std::int32_t kFraction = 64, kZeroCost = kFraction * kFraction;
// Costs are brought back to 0 before they could leave 32 bits.
constexpr std::int64_t kCostsRun = 4096;

// The nearest number and its cost in each of the four sets, [odd state][index & 1], for a size in 64ths.
struct Choices {
  std::int32_t cost[2][2];
  std::int8_t number[2][2];
};

inline std::int32_t nearest_of(std::int32_t size, std::int32_t first) {
  const std::int32_t past = size - first * kFraction + 2 * kFraction;
  return past < 0 ? first : first + 4 * (past / (4 * kFraction));
}

inline std::int32_t cost_of(std::int32_t size, std::int32_t number) {
  const std::int32_t off = size - number * kFraction;
  return off * off;
}

inline Choices choices_for(std::int32_t size) {
  Choices found;
  const std::int32_t first[2][2] = {{0, 2}, {3, 1}};
  for (int odd = 0; odd < 2; ++odd)
    for (int index = 0; index < 2; ++index) {
      const std::int32_t number = nearest_of(size, first[odd][index]);
      found.cost[odd][index] = cost_of(size, number);
      found.number[odd][index] = static_cast<std::int8_t>(number);
    }
  const std::int32_t zero = cost_of(size, 0) + kZeroCost;
  if (zero < found.cost[1][0]) {
    found.cost[1][0] = zero;
    found.number[1][0] = 0;
  }
  return found;
}

// The state from which a number of even index leads to `state`; from that for state ^ 2 leads one of odd index.
constexpr int state_before(int state) { return state < 8 ? 2 * state : 2 * (state ^ 9) + 1; }

// One step: cheapest ways to every state, and which of the two ways each took.
inline std::uint16_t advance(std::int32_t* cost, const Choices& choices) {
  std::int32_t by[2][kTrellisStates], least[kTrellisStates];
  for (int s = 0; s < kTrellisStates; ++s)
    for (int index = 0; index < 2; ++index) by[index][s] = cost[s] + choices.cost[s & 1][index];
  unsigned took = 0;
  for (int s = 0; s < kTrellisStates; ++s) {
    const std::int32_t even = by[0][state_before(s)], odd = by[1][state_before(s ^ 2)];
    took |= static_cast<unsigned>(odd < even) << s;
    least[s] = odd < even ? odd : even;
  }
  __builtin_memcpy(cost, least, sizeof least);
  return static_cast<std::uint16_t>(took);
}

inline int cheapest(const std::int32_t* cost) {
  int best = 0;
  for (int s = 1; s < kTrellisStates; ++s)
    if (cost[s] < cost[best]) best = s;
  return best;
}

inline void round_row(const float* x, std::int64_t length, std::int8_t* out) {
  auto* took = scratch<std::uint16_t>(Use::tile, length);
  auto* choices = scratch<Choices>(Use::rows, length);
  std::int32_t cost[kTrellisStates];
  for (int s = 0; s < kTrellisStates; ++s) cost[s] = s ? 1 << 29 : 0;
  for (std::int64_t i = 0; i < length; ++i) {
    // exact but for the cast: a product with a power of two
    choices[i] = choices_for(static_cast<std::int32_t>(__builtin_fabsf(x[i]) * kFraction + 0.5f));
    took[i] = advance(cost, choices[i]);
    if (i % kCostsRun == kCostsRun - 1) {
      const std::int32_t least = cost[cheapest(cost)];
      for (int s = 0; s < kTrellisStates; ++s) cost[s] -= least;
    }
  }
  int state = cheapest(cost);
  for (std::int64_t i = length; i-- > 0;) {
    const int index = (took[i] >> state) & 1;
    state = state_before(index ? state ^ 2 : state);
    const std::int8_t number = choices[i].number[state & 1][index];
    out[i] = static_cast<std::int8_t>(x[i] < 0 ? -number : number);
  }
}

void trellis(const float* x, std::int64_t rows, std::int64_t length, std::int8_t* out, int threads) {
  parallel_for(rows, threads, [&](std::int64_t i) { round_row(x + i * length, length, out + i * length); });
}

}  // namespace LORASPAN_ISA
}  // namespace loraspan
